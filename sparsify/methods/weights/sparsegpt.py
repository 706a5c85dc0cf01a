"""SparseGPT: zeros are chosen by the error that they make, and the weights that remain make up for it.

arXiv 2301.00774. Of a matrix W [outputs, inputs] that reads rows x, the error is that of W x on calibration tokens. With
H = Σ x xᵀ + damping and U the upper Cholesky factor of H⁻¹, column i may be set to anything: what the columns behind it must
change by, so that the error is least, is (w_i - q_i) / U_ii · U_i,j. Columns are set from left to right; the score of a weight,
w² / U_ii², is the error of its zero at best. Scores are compared within a block of columns, over all rows.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sparsify.methods.base import register
from sparsify.methods.weights.pruning import Pruned, PruningSettings, WeightPruning
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.wanda import wanda_or_magnitude
from sparsify.methods.weights.zeros import OLD, ZeroPattern

LEAST_ROWS_PER_INPUT = 2
"""With fewer calibration tokens for each input of a matrix, its Hessian says too little."""


class SparseGptSettings(PruningSettings):
    damping: float = Field(
        default=0.01,
        gt=0,
        le=1000,
        description="Above 0: what is added to the Hessian's diagonal, as a share of the mean of that.",
    )
    block_columns: int = Field(
        default=128,
        ge=1,
        le=65_536,
        description="Columns among whose weights zeros are chosen together, 1 to 65,536.",
    )


@register
class SparseGpt(WeightPruning):
    """Zeros by the error that they make; the other weights of the row are changed so that it is least."""

    name = "sparsegpt"
    paper = "SparseGPT, arXiv 2301.00774"
    Settings = SparseGptSettings
    reads = "products"

    def prune(self, weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern) -> Pruned:
        settings = self.settings
        assert isinstance(settings, SparseGptSettings)
        assert seen.products is not None
        needed = LEAST_ROWS_PER_INPUT * weight.shape[1]
        if seen.num_rows < needed:
            because = f"{seen.num_rows:,} of at least {needed:,} calibration tokens reached it"
            return wanda_or_magnitude(weight, seen, zeros, because)
        if not seen.is_factored:  # once for all matrices that read the same
            seen.factor, seen.is_factored = inverse_factor(seen.products, settings.damping), True
        upper = seen.factor
        if upper is None:
            return wanda_or_magnitude(weight, seen, zeros, "its Hessian is singular")
        dead = seen.products.diagonal() == 0
        return Pruned(prune_columns(weight, upper, dead, zeros, settings.block_columns), self.name)


def inverse_factor(products: torch.Tensor, damping: float) -> torch.Tensor | None:
    """Upper Cholesky factor of the inverse of the damped Hessian; float64 as that is. None where that is singular.

    An input that was always zero counts as if it were by itself, of energy 1.
    """
    hessian = products.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1.0
    diagonal += damping * diagonal.mean()
    factor, failed = torch.linalg.cholesky_ex(hessian)
    del hessian  # of a wide matrix each copy is as large as a layer's weights
    if int(failed) or not bool(factor.isfinite().all()):
        return None
    inverse = torch.cholesky_inverse(factor)
    del factor
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    return None if int(failed) or not bool(upper.isfinite().all()) else upper


def prune_columns(
    weight: torch.Tensor, upper: torch.Tensor, dead: torch.Tensor, zeros: ZeroPattern, block_columns: int
) -> torch.Tensor:
    """The pruned matrix, in the dtype of `weight`.

    Args:
        weight: [outputs, inputs]. What is zero stays zero and counts as one of the zeros.
        upper: Of `inverse_factor`, [inputs, inputs].
        dead: Inputs that were always zero, bool [inputs]: their weights become zero, and count.
        zeros: How many weights become zero, and among which.
        block_columns: Columns whose scores are compared; rounded to whole groups of an N:M pattern.
    """
    upper = upper.to(weight.dtype)
    old = weight == 0
    weight = weight.masked_fill(dead, 0.0)
    scale = upper.diagonal()
    step = max(zeros.group, block_columns - block_columns % zeros.group)
    for start in range(0, weight.shape[1], step):
        block, errors = slice(start, start + step), []
        part, own, mask = weight[:, block], upper[block, block], old[:, block].clone()

        def scores(columns: slice, part: torch.Tensor = part, start: int = start) -> torch.Tensor:
            absolute = slice(start + columns.start, start + columns.stop)
            return (part[:, columns] / scale[absolute]).square().masked_fill(old[:, absolute], OLD)

        if zeros.kept is None:
            mask |= zeros.anywhere(scores(slice(0, part.shape[1])))
        for i in range(part.shape[1]):
            if zeros.kept is not None and i % zeros.group == 0:
                group = slice(i, min(i + zeros.group, part.shape[1]))
                mask[:, group] |= zeros.in_groups(scores(group))
            column = part[:, i].clone()
            rounded = column.masked_fill(mask[:, i], 0.0)
            error = (column - rounded) / own[i, i]
            part[:, i:] -= error[:, None] * own[i, i:]
            part[:, i] = rounded
            errors.append(error)
        # `part` is a view. The columns behind the block get the changes of all its columns at once.
        weight[:, start + step :] -= torch.stack(errors, dim=1) @ upper[block, start + step :]
    return weight
