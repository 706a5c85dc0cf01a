"""Percentile thresholds without training (arXiv 2412.12178): in every layer the smallest activations become exact zeros.

A layer's threshold t is the quantile, at the wanted share, of |h| over the calibration tokens and the layer's neurons (of all
its experts, over the tokens routed to each): h is set to zero where |h| <= t. The paper does not say which vector it masks: here
it is the product of both factors unless `site` is `gate`. The quantile is read from a histogram of magnitudes with bins of half
a per cent, so memory does not grow with tokens. A layer of which that share is zero already, as of ReLU activations, gets t = 0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sparsify.methods.base import register
from sparsify.methods.pooled import OneThreshold, ZerosSettings


class PercentileSettings(ZerosSettings):
    site: Literal["inter", "gate"] = Field(
        default="inter",
        description="inter, the product of both factors, or gate, the gate's factor.",
    )


@register
class Percentile(OneThreshold):
    name = "percentile"
    paper = "arXiv 2412.12178"
    Settings = PercentileSettings

    def __init__(self, settings: PercentileSettings) -> None:
        super().__init__(settings)
        self.site = settings.site
