"""Thresholds that give a layer a wanted share of exact zeros.

Neuron i is zeroed where |h_i| · |w_down,i| does not exceed one number T of its layer, the norm of what the neuron would add to
the stream (CETT's criterion, arXiv 2402.03804): its threshold on |h_i| is T / |w_down,i|. T is a quantile over tokens and
neurons, from a histogram, so that memory does not grow with tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsify.methods.histogram import Bins
from sparsify.methods.layerwise import Expert
from sparsify.models import FfnActivation

OUTPUT_NORM_BINS = Bins("log", lowest=-60.0, per_unit=200, num_bins=24_000, includes_upper=False)
"""A bin is half a per cent wide; e^-60 and less counts as zero."""
TINY = 1e-30
"""Norm of a column that is all zeros: its neuron says nothing and is always zeroed."""


def output_norms(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """|h_i| · |w_down,i| of an expert's inputs [rows, hidden]: [rows, neurons]."""
    return expert.neurons(x).abs() * expert.down.norm(dim=0)


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
