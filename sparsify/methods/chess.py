"""CHESS (arXiv 2409.01366): each neuron's gate has a threshold of its own, lower the larger its up factor usually is.

What neuron c adds to a token's output is g_c · u_c times its column of W_down. u_c is not known before W_up is read, so its mean over
the calibration tokens, m_c, is put in its place: g_c is set to zero where |g_c| · m_c <= T, T being the quantile of that score over
tokens and neurons. So t_c = T / m_c. In experts u_c is multiplied by the router's weight of the token, as the output is.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.pooled import Moment, ZerosSettings, channel_means, layer_threshold, magnitudes
from sparsify.models import SiteRule


class ChessSettings(ZerosSettings):
    up_statistic: Moment = Field(
        default="rms",
        description="Mean of the up factor: rms, sqrt(E[u²]), as in the code of 2024, or mean_abs, E|u|, as in that of 2025.",
    )
    attention: bool = Field(
        default=False,
        description="Whether to mask what the query and output projections read as well (published as CHESS w/).",
    )


@register
class Chess:
    name = "chess"
    paper = "arXiv 2409.01366"
    Settings = ChessSettings
    reconstructs = False

    def __init__(self, settings: ChessSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        attention = {site: SiteRule(per="layer") for site in ("attn_in.q", "attn_out")}
        return (attention if self._settings.attention else {}) | {"gate": SiteRule(per="channel")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        share = self._settings.target_zeros
        if site != "gate":
            return layer_threshold(layer, site, share)
        means = channel_means(layer, "up", self._settings.up_statistic)
        if not share:
            return Fitted({"threshold": torch.full_like(means.values, -math.inf)})
        scale = magnitudes(layer, site, means.values).quantile(share)
        # A neuron whose up factor is always 0 adds nothing: it never needs to be kept.
        thresholds = torch.where(means.values > 0, scale / means.values, math.inf)
        record = {"gate_scale": scale, "pooled_experts": means.pooled}
        return Fitted({"threshold": thresholds}, record)
