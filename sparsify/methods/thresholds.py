"""Thresholds that give a layer a wanted share of exact zeros.

Neuron i is zeroed where |h_i| · |w_down,i| does not exceed one number T of its layer, the norm of what the neuron would add to
the stream (CETT's criterion, arXiv 2402.03804): its threshold on |h_i| is T / |w_down,i|. T is a quantile over tokens and
neurons, from a histogram, so that memory does not grow with tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.pooled import magnitudes
from sparsify.models import SiteRule

TINY = 1e-30
"""Norm of a column that is all zeros: its neuron adds nothing and is always zeroed."""


class ThresholdSettings(MethodSettings):
    target_zeros: float = Field(gt=0, lt=1, description="Share of exact zeros that every layer gets, such as 0.9.")


@register
class OutputNormThresholds:
    name = "thresholds"
    paper = "arXiv 2402.03804 (the criterion)"
    Settings = ThresholdSettings
    reconstructs = True

    def __init__(self, settings: ThresholdSettings) -> None:
        self._share = settings.target_zeros

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {"inter": SiteRule(per="channel")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        """T / |w_down,i| of every neuron, [experts, neurons]."""
        norms = torch.stack([expert.down.norm(dim=0) for expert in layer.experts])
        scale = magnitudes(layer, site, norms).quantile(self._share)
        return Fitted({"threshold": scale / norms.clamp(min=TINY)}, {"threshold_scale": scale})
