"""GPTQ: weights become integers column by column, and those that are numbers still make up for the error.

arXiv 2210.17323. As in `sparsegpt.py`, with H = Σ x xᵀ + damping and U the upper Cholesky factor of H⁻¹: when column i has become q_i,
what the columns behind it must change by, so that the error of W x is least, is (w_i - q_i) / U_ii · U_i,j. Scales are chosen before, by
the squared error of the weights (`integers.py`). Columns keep their order.
"""

from __future__ import annotations

import torch

from sparsify.methods.weights.integers import IntegerMatrix, best_scales, nearest

BLOCK_COLUMNS = 128
"""Columns after which those behind are changed at once; the result does not depend on it, but for rounding."""


def gptq(
    weight: torch.Tensor, upper: torch.Tensor, dead: torch.Tensor, bits: int, block_columns: int = BLOCK_COLUMNS
) -> IntegerMatrix:
    """A matrix [outputs, inputs] in fp32 or fp64.

    Args:
        weight: Is not changed.
        upper: Of `inverse_factor`, [inputs, inputs].
        dead: Inputs that were always zero, bool [inputs]: their weights become zero.
        bits: 4 or 8.
        block_columns: See BLOCK_COLUMNS.
    """
    upper = upper.to(weight.dtype)
    weight = weight.masked_fill(dead, 0.0)
    scales = best_scales(weight, bits)
    codes = torch.empty_like(weight, dtype=torch.int8)
    for start in range(0, weight.shape[1], block_columns):
        block, errors = slice(start, start + block_columns), []
        part, own = weight[:, block], upper[block, block]
        for i in range(part.shape[1]):
            column = part[:, i]
            code = nearest(column[:, None], scales, bits)[:, 0]
            error = (column - code * scales) / own[i, i]
            part[:, i + 1 :] -= error[:, None] * own[i, i + 1 :]
            codes[:, start + i] = code.to(torch.int8)
            errors.append(error)
        # `part` is a view. The columns behind the block get the changes of all its columns at once.
        weight[:, start + block_columns :] -= torch.stack(errors, dim=1) @ upper[block, start + block_columns :]
    return IntegerMatrix(codes, scales.float(), bits)
