"""Statistics over the calibration tokens of a layer, its experts' together: quantiles of a site's scores, and means per channel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.methods.histogram import THRESHOLD_BINS, Histogram
from sparsify.methods.layerwise import LEAST_ROWS
from sparsify.models import SiteRule

Moment = Literal["rms", "mean_abs"]


class ZerosSettings(MethodSettings):
    """Settings of a mask that drops nothing at a share of 0."""

    target_zeros: float = Field(
        ge=0, lt=1, description="Share of exact zeros at every masked site, such as 0.5; 0 changes nothing."
    )


def magnitudes(layer: LayerValues, site: str, scale: torch.Tensor | None = None) -> Histogram:
    """Histogram of |x| · scale, with |x| by proxy where the site's rule chooses so, over tokens and channels, of experts over the tokens
    routed to each.

    Args:
        layer: Its values before the site's mask.
        site: The site.
        scale: What magnitudes are multiplied by, [experts, channels]; None for 1.
    """
    histogram = Histogram(THRESHOLD_BINS, device=layer.device)
    for chunk in layer.values(site):
        scores = chunk.values.abs() if chunk.sizes is None else chunk.sizes
        histogram.add(scores if scale is None else scores * scale[chunk.number])
    return histogram


def layer_threshold(layer: LayerValues, site: str, share: float) -> Fitted:
    """The mask that makes a share of a site's elements zero by one threshold of the layer; 0 keeps everything, bit by bit.

    At most half a per cent above the exact quantile of |x|; 0 where the site has so many zeros already.
    """
    threshold = magnitudes(layer, site).quantile(share) if share else -math.inf
    record = {f"{site}_threshold": threshold} if share else {}
    return Fitted({"threshold": torch.tensor([threshold], device=layer.device)}, record)


class OneThreshold:
    """A mask of one site by one threshold for each layer, that of `layer_threshold`. A method adds its name, paper and site."""

    Settings = ZerosSettings
    reconstructs = False
    site: str

    def __init__(self, settings: ZerosSettings) -> None:
        self._share = settings.target_zeros

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {self.site: SiteRule(per="layer")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        return layer_threshold(layer, site, self._share)


@dataclass(frozen=True)
class ChannelMeans:
    """Means of every channel's magnitude.

    Attributes:
        values: [experts, channels].
        pooled: Experts with fewer calibration tokens than LEAST_ROWS: all their channels have the layer's mean.
    """

    values: torch.Tensor
    pooled: list[int]


def channel_means(layer: LayerValues, site: str, moment: Moment) -> ChannelMeans:
    """sqrt(E[(p·x)²]) or E|p·x| of every channel x of a site, p being the router's weight of the token, 1 outside experts.

    Computed in float64, given in float32.
    """
    power = 2 if moment == "rms" else 1
    sums: dict[int, torch.Tensor] = {}
    rows = [0] * max(1, len(layer.experts))
    channels = 0
    for chunk in layer.values(site):
        weighted = chunk.values.double().abs() * chunk.weights[:, None].double()
        total = weighted.pow(power).sum(0)
        sums[chunk.number] = sums.get(chunk.number, 0) + total
        rows[chunk.number] += len(weighted)
        channels = len(total)
    overall = torch.stack(list(sums.values())).sum() / (sum(rows) * channels)
    pooled = [number for number, count in enumerate(rows) if count < LEAST_ROWS and len(rows) > 1]
    means = [
        overall.expand(channels) if number in pooled else sums[number] / count for number, count in enumerate(rows)
    ]
    return ChannelMeans(torch.stack(means).pow(1 / power).float(), pooled)
