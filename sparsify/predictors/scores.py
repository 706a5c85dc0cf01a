"""Histograms of predictor scores, from which a threshold for any recall follows without storing scores."""

from __future__ import annotations

import torch

from sparsify.methods.histogram import Bins, Histogram

SCORE_BINS = Bins("linear", lowest=-32.0, per_unit=64, num_bins=4096)
FIRED, SILENT = range(2)


class FiringScores:
    """Histogram of the scores of neurons that fired, and of neurons that did not.

    A neuron is switched on above the threshold, so a score on an edge of a bin belongs below it.
    """

    def __init__(self) -> None:
        self._histogram = Histogram(SCORE_BINS, num_rows=2)

    def add(self, scores: torch.Tensor, fired: torch.Tensor) -> None:
        """Counts scores; `fired` is bool of the same shape."""
        self._histogram.add(scores[fired], FIRED)
        self._histogram.add(scores[~fired], SILENT)

    def threshold(self, recall: float) -> float:
        """The highest threshold, to a bin, above which at least that share of the firing neurons scores."""
        from_here = self._histogram.counts[FIRED].flip(0).cumsum(0).flip(0)
        enough = torch.nonzero(from_here[1:] >= recall * int(from_here[0])).flatten()
        return SCORE_BINS.edge(int(enough[-1]) if from_here[0] and len(enough) else 0)

    def at(self, threshold: float) -> tuple[float | None, float | None]:
        """Recall and share of neurons switched on at a threshold; None without values."""
        edge = round((threshold - SCORE_BINS.lowest) * SCORE_BINS.per_unit)
        fired, silent = self._histogram.total(FIRED), self._histogram.total(SILENT)
        hit, false = self._histogram.above(edge, FIRED), self._histogram.above(edge, SILENT)
        recall = hit / fired if fired else None
        return recall, (hit + false) / (fired + silent) if fired + silent else None

    @property
    def firing_share(self) -> float | None:
        """Share of values that fired."""
        fired, silent = self._histogram.total(FIRED), self._histogram.total(SILENT)
        return fired / (fired + silent) if fired + silent else None
