"""Activation magnitudes and output norms of every layer, counted by a probe."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.methods.histogram import Bins, Histogram
from sparsify.models import SparseModel
from sparsify.models.masking import num_experts
from sparsify.sparsity.probe import PIECE_ROWS, Tokens

MAGNITUDE_BINS = Bins("log2", lowest=-48, per_unit=64, num_bins=80 * 64)
"""A bin is 1.1% wide; 2^-48 and less counts as zero."""


class MagnitudeObserver:
    """Gathers two histograms from a SparsityProbe: of |h|, and of the norm of what a neuron adds to the block's output."""

    def __init__(self, model: SparseModel) -> None:
        num_layers = len(model.model.layers)
        self.activations, self.outputs = (Histogram(MAGNITUDE_BINS, num_layers) for _ in range(2))
        self._norms = down_norms(model)

    def begin(self, tokens: Tokens) -> None:
        """Nothing depends on the tokens."""

    def add(
        self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor
    ) -> None:
        for rows in product.split(PIECE_ROWS):
            magnitudes = rows.float().abs()
            self.activations.add(magnitudes, layer)
            self.outputs.add(magnitudes * self._norms[layer][expert], layer)


def down_weight(block: Any, expert: int) -> torch.Tensor:
    """Down projection of a block or of one of its experts, [hidden, neurons]."""
    down = block.down_proj
    return down[expert] if isinstance(down, torch.nn.Parameter) else down.weight


@torch.no_grad()
def down_norms(model: SparseModel) -> list[torch.Tensor]:
    """Norm of every neuron's column of the down projection, [experts, neurons] float32 for each layer."""
    experts = num_experts(model.config)
    return [
        torch.stack([down_weight(block, e).float().norm(dim=0) for e in range(experts)])
        for block in model.ffn_blocks()
    ]
