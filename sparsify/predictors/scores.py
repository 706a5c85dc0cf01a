"""Counts of scores in bins, so that a threshold for any recall needs no stored scores."""

from __future__ import annotations

import torch

LARGEST_SCORE = 32.0
NUM_BINS = 4096
BIN_WIDTH = 2 * LARGEST_SCORE / NUM_BINS


class ScoreHistogram:
    """Scores of neurons that fired and of those that did not.

    Attributes:
        fired, silent: int64 [NUM_BINS] on the CPU, from the lowest score to the highest.
    """

    def __init__(self) -> None:
        self.fired, self.silent = (torch.zeros(NUM_BINS, dtype=torch.int64) for _ in range(2))

    def add(self, scores: torch.Tensor, fired: torch.Tensor) -> None:
        """Counts scores; `fired` is bool of the same shape."""
        # A bin holds (low, high], as a neuron is on above the threshold.
        places = ((scores.float() + LARGEST_SCORE) / BIN_WIDTH).ceil() - 1
        places = places.clamp(0, NUM_BINS - 1).long()
        self.fired += torch.bincount(places[fired], minlength=NUM_BINS).cpu()
        self.silent += torch.bincount(places[~fired], minlength=NUM_BINS).cpu()

    def threshold(self, recall: float) -> float:
        """The highest threshold, to a bin, above which at least that share of the firing neurons scores."""
        above = self.fired.flip(0).cumsum(0).flip(0)
        total = int(above[0])
        enough = torch.nonzero(above >= recall * total).flatten()
        return -LARGEST_SCORE + int(enough[-1] if total else 0) * BIN_WIDTH

    def at(self, threshold: float) -> tuple[float | None, float | None]:
        """Recall and share of neurons switched on at a threshold; None without values."""
        first = round((threshold + LARGEST_SCORE) / BIN_WIDTH)
        fired, silent = int(self.fired.sum()), int(self.silent.sum())
        hit, false = int(self.fired[first:].sum()), int(self.silent[first:].sum())
        recall = hit / fired if fired else None
        return recall, (hit + false) / (fired + silent) if fired + silent else None

    @property
    def firing_share(self) -> float | None:
        """Share of values that fired."""
        fired, silent = int(self.fired.sum()), int(self.silent.sum())
        return fired / (fired + silent) if fired + silent else None
