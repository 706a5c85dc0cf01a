"""Histograms of activation magnitudes: a fixed number of bins, so that thresholds at any share need no stored activations."""

from __future__ import annotations

from typing import Any

import torch

from sparsify.models import SparseModel
from sparsify.sparsity.probe import PIECE_ROWS, Tokens

BINS_PER_OCTAVE = 64
LOWEST_OCTAVE, HIGHEST_OCTAVE = -48, 32
NUM_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE + 1


class MagnitudeHistogram:
    """Counts magnitudes of every layer in bins of 1.1% width. Entry 0 holds zeros and what is below the lowest octave.

    Attributes:
        counts: int64 [layers, NUM_BINS] on the CPU.
    """

    def __init__(self, num_layers: int) -> None:
        self.counts = torch.zeros(num_layers, NUM_BINS, dtype=torch.int64)

    def add(self, layer: int, magnitudes: torch.Tensor) -> None:
        """Counts magnitudes of any shape."""
        octaves = (magnitudes.float().log2() - LOWEST_OCTAVE) * BINS_PER_OCTAVE
        bins = octaves.ceil().clamp(0, NUM_BINS - 1).long().flatten()
        self.counts[layer] += torch.bincount(bins, minlength=NUM_BINS).cpu()

    def threshold(self, layer: int, share: float, *, of_nonzero: bool = False) -> float:
        """Magnitude that the given share of values does not exceed, up to the width of a bin; 0 where zeros are enough.

        Args:
            layer: Index of the layer.
            share: 0 to 1.
            of_nonzero: Whether the share is one of the values above zero.
        """
        counts = self.counts[layer].clone()
        if of_nonzero:
            counts[0] = 0
        cumulative = counts.cumsum(0)
        wanted = torch.tensor(round(share * int(cumulative[-1])))
        index = int(torch.searchsorted(cumulative, wanted))
        return 0.0 if index == 0 else 2.0 ** (LOWEST_OCTAVE + index / BINS_PER_OCTAVE)


class MagnitudeObserver:
    """Gathers two histograms from a SparsityProbe: of |h|, and of the norm of what a neuron adds to the block's output."""

    def __init__(self, model: SparseModel) -> None:
        num_layers = len(model.model.layers)
        self.activations, self.outputs = (MagnitudeHistogram(num_layers) for _ in range(2))
        self._norms = down_norms(model)

    def begin(self, tokens: Tokens) -> None:
        """Nothing depends on the tokens."""

    def add(
        self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor
    ) -> None:
        """Counts one block."""
        for rows in product.split(PIECE_ROWS):
            magnitudes = rows.float().abs()
            self.activations.add(layer, magnitudes)
            self.outputs.add(layer, magnitudes * self._norms[layer][expert])


def down_weight(block: Any, expert: int) -> torch.Tensor:
    """Down projection of a block or of one of its experts, [hidden, neurons]."""
    down = block.down_proj
    return down[expert] if isinstance(down, torch.nn.Parameter) else down.weight


@torch.no_grad()
def down_norms(model: SparseModel) -> list[torch.Tensor]:
    """Norm of every neuron's column of the down projection, [experts, neurons] float32 for each layer."""
    experts = getattr(model.config, "num_local_experts", 1)
    return [
        torch.stack([down_weight(block, e).float().norm(dim=0) for e in range(experts)])
        for block in model.ffn_blocks()
    ]
