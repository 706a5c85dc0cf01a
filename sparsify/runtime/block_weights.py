"""Models that hold their weights only in blocks: for decoding alone, the stored weights need not stay in memory.

Prompts multiply with what the blocks stand for, and round the states as decoding does, so `model(ids)` measures what the blocks
cost. Embeddings, norms and routers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsify.errors import ModelError
from sparsify.models.projection_masks import masked_product
from sparsify.models.quantised import BlockMatrix, product
from sparsify.runtime.forwards import BlockForward
from sparsify.runtime.masks import is_masked_linear
from sparsify.runtime.native_step import Projections, projections
from sparsify.runtime.packed import PackedMatrix


class BlockProduct:
    """Forward of a linear layer whose weight is only in blocks; its mask and remainder, if it has any, stay."""

    def __init__(self, matrix: BlockMatrix | PackedMatrix, module: nn.Module, *, by_columns: bool) -> None:
        self.matrix: Any = matrix  # whichever it is, what is needed of it is `dequantised`
        self.by_columns = by_columns
        self._module, self._masked = module, module if is_masked_linear(module) else None

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        """Maps [..., inputs] to [..., outputs]."""
        if self._masked is None:
            return self._multiply(input)
        return masked_product(self._masked, input, self._multiply)

    def _multiply(self, input: torch.Tensor) -> torch.Tensor:
        output = product(input, self.matrix, by_columns=self.by_columns)
        bias: Any = self._module.bias
        return output if bias is None else output + bias


def drop_block(forward: BlockForward) -> None:
    """Frees the weights of a feed-forward block, but not its router. What is left of each has its shape, on the device `meta`."""
    forward.freeze()
    router = getattr(forward.block, "group_router", None)
    for part in (one for one in forward.block.modules() if one is not router):
        for name in [one for one, _ in part.named_parameters(recurse=False)]:
            _empty(part, name)


def drop_projections(model: Any, given: Projections) -> None:
    """Frees the weights of the attention's projections and of the output layer, one after the other."""
    for name, module in projections(model).items():
        matrix = given.matrix(name, module)
        assert not isinstance(matrix, torch.Tensor)
        module.forward = BlockProduct(matrix, module, by_columns=given.by_columns(name))
        _empty(module, "weight")
        given.freeze(name)
    model.save_pretrained = _refuse_to_save


def are_dropped(model: Any) -> bool:
    """Whether a model's stored weights were freed."""
    return vars(model).get("save_pretrained") is _refuse_to_save


def check_not_dropped(model: Any) -> None:
    """Raises ModelError if a model's stored weights were freed: then there is nothing to make other blocks of."""
    if are_dropped(model):
        raise ModelError(
            "The model holds its weights in blocks alone.",
            next_step="Load it again, or accelerate it with keep_weights=True.",
        )


def _refuse_to_save(*_: Any, **__: Any) -> None:
    raise ModelError(
        "The model holds its weights in blocks alone, so it cannot be saved.",
        next_step="Load it again and save that, or accelerate it with keep_weights=True.",
    )


def _empty(module: nn.Module, name: str) -> None:
    weight = getattr(module, name)
    empty = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    setattr(module, name, nn.Parameter(empty, requires_grad=False))
