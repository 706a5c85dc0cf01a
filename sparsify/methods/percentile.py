"""Percentile thresholds without training (arXiv 2412.12178): in every layer the smallest activations become exact zeros.

A layer's threshold t is the quantile, at the wanted share, of |h| over the calibration tokens and the layer's neurons (of all
its experts, over the tokens routed to each): h is set to zero where |h| <= t. The paper does not say which vector it masks: here
it is the product of both factors unless `site` is `gate`. The quantile is read from a histogram of magnitudes with bins of half
a per cent, so memory does not grow with tokens. A layer of which that share is zero already, as of ReLU activations, gets t = 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.histogram import THRESHOLD_BINS, Histogram
from sparsify.models import SiteRule


class PercentileSettings(MethodSettings):
    target_zeros: float = Field(
        ge=0,
        lt=1,
        description="Share of exact zeros of every layer, such as 0.5; 0 changes nothing.",
    )
    site: Literal["inter", "gate"] = Field(
        default="inter",
        description="inter, the product of both factors, or gate, the gate's factor.",
    )


@register
class Percentile:
    name = "percentile"
    paper = "arXiv 2412.12178"
    Settings = PercentileSettings
    reconstructs = False

    def __init__(self, settings: PercentileSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {self._settings.site: SiteRule(per="layer")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        share, threshold = self._settings.target_zeros, -math.inf
        if share:
            magnitudes = Histogram(THRESHOLD_BINS, device=layer.device)
            for chunk in layer.values(site):
                magnitudes.add(chunk.values.abs())
            threshold = magnitudes.quantile(share)
        record = {"threshold": threshold} if share else {}
        return Fitted({"threshold": torch.tensor([threshold], device=layer.device)}, record)
