"""Masked inputs of projections, and products of these with the columns of their elements that are not zero, by Triton kernels.

Nothing here waits for the device.
"""

from __future__ import annotations

import contextlib
from types import ModuleType
from typing import Any

import torch

from sparsify.models.masking import NUMBERS
from sparsify.runtime.triton_ffn import (
    BLOCKS,
    MASK_WARPS,
    NUM_WARPS,
    SUM_BLOCK,
    add_rows,
    power_of_two,
    triton_kernels,
)


def masked_by_triton(mask: Any, x: torch.Tensor) -> torch.Tensor:
    """A `SiteMask` applied to x [..., channels], and its rotation, if it has one. Of equal scores the first are kept.

    Returns:
        The shape of x; [experts, tokens, channels] if the mask has numbers or weights for each expert.
    """
    kernels = triton_kernels(x.device)
    assert kernels is not None, "the caller asks triton_can"
    tensors = {name: values for name, values in mask.named_buffers(recurse=False) if name != "basis"}
    experts = max((len(one) for one in tensors.values() if one.dim() > 1), default=0)
    basis = getattr(mask, "basis", None)
    rows = (x if basis is None else x @ basis).reshape(-1, x.shape[-1])
    out = launch_mask(kernels, mask, rows if rows.stride(-1) == 1 else rows.contiguous(), experts or 1)
    return out if experts else out.view(x.shape)


def launch_mask(kernels: ModuleType, mask: Any, x: torch.Tensor, experts: int) -> torch.Tensor:
    """As `masked_by_triton`, for x [tokens, channels], with the kernels given: [experts, tokens, channels]."""
    rule = getattr(mask, "rule", None)  # bundles of older versions know thresholds alone
    name = "threshold" if rule is None else rule.rule
    number, weight = getattr(mask, NUMBERS[name]).contiguous(), getattr(mask, "weight", None)
    tokens, channels = x.shape
    block = power_of_two(channels)
    out = x.new_empty(experts, tokens, channels)
    start: Any = kernels.mask_input
    with _on(x):
        start[tokens, experts](
            *(x, number, weight, out, channels, x.stride(0)),
            *(0 if number.shape[-1] == 1 else 1, number.stride(0) if number.dim() > 1 else 0),
            *(weight.stride(0) if weight is not None and weight.dim() > 1 else 0,),
            **{"RULE": name, "WEIGHTED": weight is not None, "BLOCK": block, "num_warps": MASK_WARPS},
        )
    return out


def column_product(x: torch.Tensor, weight_t: torch.Tensor, counts: torch.Tensor, place: int) -> torch.Tensor:
    """The product of x [..., inputs] of at most 8 rows with a projection that is held by columns.

    Args:
        x: Columns of elements that are zero in every row are not read.
        weight_t: [inputs, outputs]; the elements of a row are adjacent.
        counts: int64, on the device of x.
        place: Index of the count to which the number of columns read is added, at most 3.

    Returns:
        [..., outputs] of x's dtype.
    """
    kernels = triton_kernels(x.device)
    assert kernels is not None, "the caller asks triton_can"
    rows = x.reshape(-1, x.shape[-1])
    out = launch_columns(kernels, rows, weight_t, counts, place)
    return out.view(*x.shape[:-1], out.shape[-1])


def launch_columns(
    kernels: ModuleType, x: torch.Tensor, weight_t: torch.Tensor, counts: torch.Tensor, place: int
) -> torch.Tensor:
    """As `column_product`, for x [tokens, inputs], with the kernels given."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, outputs = len(x), weight_t.shape[1]
    padded = power_of_two(tokens)
    rows, width = BLOCKS[padded]
    block = {"T": padded, "SLOTS": 0, "ROWS": rows, "WIDTH": width, "num_warps": NUM_WARPS}
    out, sent = x.new_empty(tokens, outputs), (None, tokens, 1)
    at_once, width = SUM_BLOCK
    start: Any = kernels.sum_chunks
    with _on(x):
        partial, chunks = add_rows(kernels, x[None], weight_t[None], sent, block, counts, place, dense=False)
        start[-(-outputs // width), tokens](
            *(partial, out, None, None, None, tokens, 1, chunks, outputs),
            **{"SLOTS": 0, "CHUNKS": at_once, "WIDTH": width, "CONSTANT": False, "num_warps": NUM_WARPS},
        )
    return out


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
