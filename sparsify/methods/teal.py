"""TEAL (arXiv 2408.14690): every projection of a layer reads only those of its inputs whose magnitude exceeds a threshold.

The thresholds are quantiles of |x| over the calibration tokens, one for what each of the seven projections reads; experts have one for
all. At equal shares everywhere (`uniform`), or at shares that are chosen within each layer by what they do to its output (`greedy`,
`methods/greedy.py`): then the layer's weights, not each projection's, have the wanted share.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.greedy import greedy_shares
from sparsify.methods.pooled import ZerosSettings, layer_threshold, magnitudes
from sparsify.models import SiteRule

TEAL_SITES = ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "ffn_in.gate", "ffn_in.up", "inter")
GREEDY_TOKENS = 1024
"""Tokens that candidates are compared on."""


class TealSettings(ZerosSettings):
    allocation: Literal["uniform", "greedy"] = Field(
        default="uniform",
        description="uniform, equal shares at all sites, or greedy, shares chosen in each layer by the error of its output.",
    )
    greedy_step: float = Field(
        default=0.1,
        gt=0,
        le=1,
        description="Step of the greedy allocation, as a share of the largest projection: 0.05 takes twice the time of 0.1.",
    )

    @field_validator("greedy_step")
    @classmethod
    def _used(cls, step: float, info: Any) -> float:
        if info.data.get("allocation") == "uniform":
            raise PydanticCustomError("ignored", "Would be ignored: allocation is uniform")
        return step


@register
class Teal:
    name = "teal"
    paper = "arXiv 2408.14690"
    Settings = TealSettings
    reconstructs = False

    def __init__(self, settings: TealSettings) -> None:
        self._settings = settings
        self._shares: dict[str, float] = dict.fromkeys(TEAL_SITES, settings.target_zeros)

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {site: SiteRule(per="layer") for site in TEAL_SITES}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        if site == TEAL_SITES[0] and self._settings.allocation == "greedy" and self._settings.target_zeros:
            self._shares = self._chosen(layer)
        share = self._shares[site]
        fitted = layer_threshold(layer, site, share)
        if self._settings.allocation == "greedy":
            fitted.record[f"{site}_zeros"] = share
        return fitted

    def _chosen(self, layer: LayerValues) -> dict[str, float]:
        """Shares of a layer, from its values before any mask."""
        histograms = {site: magnitudes(layer, site) for site in TEAL_SITES}
        # A projection is read once for each of its rows of inputs, which are more where a token goes to several experts.
        outputs = {site: next(iter(layer.weights(site).values()))[0].shape[0] for site in TEAL_SITES}
        weights = {site: histograms[site].total() * outputs[site] for site in TEAL_SITES}

        def parts_of(site: str, share: float) -> dict[str, torch.Tensor]:
            return {"threshold": torch.tensor([histograms[site].quantile(share)], device=layer.device)}

        target, step = self._settings.target_zeros, self._settings.greedy_step
        return greedy_shares(layer, weights, parts_of, target, step, GREEDY_TOKENS)
