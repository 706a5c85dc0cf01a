"""Thresholds that give a layer a wanted share of exact zeros.

Neuron i is zeroed where |h_i| · |w_down,i| does not exceed one number T of its layer, the norm of what the neuron would add to
the stream (CETT's criterion, arXiv 2402.03804): its threshold on |h_i| is T / |w_down,i|. T is a quantile over tokens and
neurons, from a histogram, so that memory does not grow with tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from sparsify.methods.layerwise import Expert
from sparsify.models import FfnActivation

LOWEST, HIGHEST = -60.0, 60.0
"""Range of the histogram, in natural logarithms."""
BINS = 24_000
"""A bin is half a per cent wide."""
TINY = 1e-30
"""Norm of a column that is all zeros: its neuron says nothing and is always zeroed."""


class OutputNorms:
    """Histogram of |h_i| · |w_down,i| over the tokens and neurons of a layer."""

    def __init__(self, device: torch.device) -> None:
        # One bin below the range for what is exactly zero, or as good as.
        self.counts = torch.zeros(BINS + 1, dtype=torch.int64, device=device)

    def add(self, expert: Expert, x: torch.Tensor) -> None:
        """Adds inputs [rows, hidden] of an expert."""
        norms = expert.neurons(x).abs() * expert.down.norm(dim=0)
        place = (norms.log() - LOWEST) * (BINS / (HIGHEST - LOWEST))
        bins = place.clamp(-1, BINS - 1).floor().long() + 1
        self.counts += torch.bincount(bins.flatten(), minlength=BINS + 1)

    def quantile(self, share: float) -> float:
        """The number that `share` of all values do not exceed; 0 where that many are zero already."""
        below = self.counts.cumsum(0)
        total = int(below[-1])
        place = int(torch.searchsorted(below, math.ceil(share * total)))
        if total == 0 or place == 0:
            return 0.0
        return math.exp(LOWEST + place * (HIGHEST - LOWEST) / BINS)


def with_thresholds(expert: Expert, scale: float, dtype: torch.dtype) -> Expert:
    """The expert with thresholds T / |w_down,i|, rounded as they will be stored.

    Args:
        expert: An expert without thresholds.
        scale: T.
        dtype: Dtype on disk.
    """
    values = scale / expert.down.norm(dim=0).clamp(min=TINY)
    old = expert.activation
    new = FfnActivation(old.name, old.gate_threshold, (len(values),))
    new.threshold = values.clamp(max=torch.finfo(dtype).max).to(dtype).to(values.dtype)
    return replace(expert, activation=new)
