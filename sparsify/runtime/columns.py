"""Which projections are held by columns: those whose input is masked, so that columns of inputs that are zero are not read.

A projection [outputs, inputs] that is held by columns lies transposed in memory, so that a column is one contiguous run. Its name,
shape and values stay; moving, casting and loading keep its strides.
"""

from __future__ import annotations

from typing import Any

import torch

from sparsify.models.activations import ACTIVATIONS, GATES_WITHOUT_ZEROS
from sparsify.models.masking import INPUTS, is_fused, site_rules


def held_by_columns(model: Any, *, in_blocks: bool) -> frozenset[str]:
    """Names of the projections that are held by columns: of `q`, `k`, `v`, `o`, `gate` and `up`.

    Up is held by rows where the gate makes zeros, and gate where a mask of up does: then a step reads fewer rows than columns. Fused
    experts store gate and up as one parameter, which has one order; int8 and int4 blocks of them are two.
    """
    rules = site_rules(model.config)
    masked = {projection.removesuffix("_proj") for site in rules if site in INPUTS for projection in INPUTS[site]}
    block = model.ffn_blocks()[0]
    own = block.ffn_activation
    up_first = "up" in rules and ("gate" not in rules or rules["gate"].rule == "threshold")
    makes_zeros = up_first or "gate" in rules or ACTIVATIONS[own.name].gate not in GATES_WITHOUT_ZEROS
    ffn = masked & {"gate", "up"}
    if is_fused(block) and not in_blocks:
        ffn = {"gate", "up"} if len(ffn) == 2 or (ffn and not makes_zeros) else set()
    elif makes_zeros:
        ffn -= {"gate" if up_first else "up"}
    return frozenset(masked - {"gate", "up"} | ffn)


def columns_first(weight: torch.Tensor) -> torch.Tensor:
    """The transpose of a projection [..., outputs, inputs], contiguous: [..., inputs, outputs]. Reorders its memory if needed."""
    if not weight.data.mT.is_contiguous():
        weight.data = weight.data.mT.contiguous().mT
    return weight.data.mT


def rows_first(weight: torch.Tensor) -> torch.Tensor:
    """A projection [..., outputs, inputs], contiguous again if `columns_first` reordered its memory."""
    if weight.data.mT.is_contiguous() and not weight.data.is_contiguous():
        weight.data = weight.data.contiguous()
    return weight.data
