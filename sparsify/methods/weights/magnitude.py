"""Magnitude pruning: the smallest weights of every matrix become zero."""

from __future__ import annotations

import torch

from sparsify.methods.base import register
from sparsify.methods.weights.pruning import Pruned, PruningSettings, WeightPruning
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.zeros import ZeroPattern


@register
class Magnitude(WeightPruning):
    """The weights of least magnitude in a matrix become zero; the others stay as they are. Looks at no text."""

    name = "magnitude"
    paper = "Learning both Weights and Connections, arXiv 1506.02626"
    Settings = PruningSettings
    reads = "nothing"

    def prune(self, weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern) -> Pruned:
        return Pruned(weight.masked_fill(zeros.anywhere(weight.abs()), 0.0), self.name)
