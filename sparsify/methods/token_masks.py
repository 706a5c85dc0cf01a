"""Masks that are decided for each token while the model runs, by published rules: what the report's curves apply.

Nothing is stored with the model, and no kernel applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

PIECE_ROWS = 1024
"""Rows in one piece, which bounds memory: a few hundred MB of copies at 14,336 neurons."""


class CettMask:
    """Drops the neurons whose output norm does not exceed their layer's threshold (arXiv 2402.03804).

    Args:
        norms: Norm of every neuron's column of the down projection, [experts, neurons] for each layer.
        thresholds: One for each layer.
    """

    def __init__(self, norms: Sequence[torch.Tensor], thresholds: Sequence[float]) -> None:
        self._norms, self._thresholds = norms, thresholds

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        norms, threshold = self._norms[layer][expert], self._thresholds[layer]
        return _in_pieces(lambda rows: rows.float().abs() * norms > threshold, product)


class TopKMask:
    """Drops a share of every token's neurons of a block, those of the smallest |h| (arXiv 2406.05955, table 3)."""

    def __init__(self, share: float) -> None:
        self._share = share

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        number = max(1, round((1 - self._share) * product.shape[-1]))

        def largest(rows: torch.Tensor) -> torch.Tensor:
            top = rows.abs().topk(number, dim=-1).indices
            return torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, top, True)

        return _in_pieces(largest, product)


class LayerThresholdMask:
    def __init__(self, thresholds: Sequence[float]) -> None:
        self._thresholds = thresholds

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        threshold = self._thresholds[layer]
        return _in_pieces(lambda rows: rows.float().abs() > threshold, product)


def _in_pieces(rule: Callable[[torch.Tensor], torch.Tensor], product: torch.Tensor) -> torch.Tensor:
    keep = torch.ones_like(product, dtype=torch.bool)
    if len(product):
        for rows, kept in zip(product.split(PIECE_ROWS), keep.split(PIECE_ROWS), strict=True):
            kept.copy_(rule(rows))
    return keep
