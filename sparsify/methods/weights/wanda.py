"""Wanda: weights become zero by their magnitude times the norm of what they are multiplied with."""

from __future__ import annotations

import torch

from sparsify.methods.base import register
from sparsify.methods.weights.pruning import Pruned, PruningSettings, WeightPruning
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.methods.weights.zeros import OLD, ZeroPattern


def by_norms(weight: torch.Tensor, norms: torch.Tensor, zeros: ZeroPattern) -> torch.Tensor:
    """The weight [outputs, inputs] with zeros where |weight| · norm of the input is least: in each row, or in each group of it."""
    scores = (weight.abs() * norms).masked_fill(weight == 0, OLD)
    return weight.masked_fill(zeros.in_rows(scores), 0.0)


@register
class Wanda(WeightPruning):
    """In every row of a matrix, the weights with the least |weight| · |input| become zero; the others stay as they are."""

    name = "wanda"
    paper = "Wanda, arXiv 2306.11695"
    Settings = PruningSettings
    reads = "norms"

    def prune(self, weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern) -> Pruned:
        return wanda_or_magnitude(weight, seen, zeros)


def wanda_or_magnitude(
    weight: torch.Tensor, seen: InputStatistics, zeros: ZeroPattern, because: str | None = None
) -> Pruned:
    """By Wanda's scores; by magnitude where nothing was read, which is said."""
    if not bool(seen.energies.any()):
        scores = weight.abs().masked_fill(weight == 0, OLD)
        found = f"{seen.num_rows:,} calibration tokens reached it" if not seen.num_rows else "all its inputs are 0"
        return Pruned(weight.masked_fill(zeros.in_rows(scores), 0.0), "magnitude", found)
    return Pruned(by_norms(weight, seen.norms, zeros), "wanda", because)
