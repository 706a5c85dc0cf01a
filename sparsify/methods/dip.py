"""Dynamic input pruning, DIP (arXiv 2412.01380): gate and up read the largest inputs of a block, down its largest neurons.

A block that should read the share ρ = 1 - target_zeros of its weights keeps ρ_u of its inputs for gate and up together, and ρ_d of the
neurons that they compute for down:

    ρ_u = σ(0.98499 · logit ρ + 0.29976),   ρ_d = 3 ρ - 2 ρ_u

so that (2 ρ_u + ρ_d) / 3 = ρ. The two numbers are those of the authors, a linear fit of the best splits. Nothing is calibrated unless
thresholds are chosen instead of top-k. The attention reads everything.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.pooled import layer_threshold
from sparsify.models import SiteRule

SLOPE, OFFSET = 0.98499, 0.29976
MOST_ZEROS = 0.999
"""Beyond it the fitted split would keep less than nothing of the neurons."""


class DipSettings(MethodSettings):
    target_zeros: float = Field(
        ge=0,
        le=MOST_ZEROS,
        description=f"Share of a block's weights that is not read, 0 to {MOST_ZEROS}, such as 0.5; 0 changes nothing.",
    )
    rule: Literal["top_k", "threshold"] = Field(
        default="top_k",
        description="top_k, the same number of elements for each token, or threshold, the quantile of |x| over the calibration tokens.",
    )
    split: Literal["fitted", "uniform"] = Field(
        default="fitted",
        description="fitted, the published split between inputs and neurons, or uniform, the same share of both.",
    )


def fitted_split(density: float) -> tuple[float, float]:
    """Shares of the inputs and of the neurons that are kept for a block to read this share of its weights, 0.001 to 1."""
    if density == 1:
        return 1.0, 1.0
    logit = math.log(density / (1 - density))
    inputs = 1 / (1 + math.exp(-SLOPE * logit - OFFSET))
    return inputs, min(1.0, max(0.0, 3 * density - 2 * inputs))


@register
class Dip:
    name = "dip"
    paper = "arXiv 2412.01380"
    Settings = DipSettings
    reconstructs = False

    def __init__(self, settings: DipSettings) -> None:
        self._settings = settings
        density = 1 - settings.target_zeros
        inputs, neurons = fitted_split(density) if settings.split == "fitted" else (density, density)
        self.kept_shares = {"ffn_in": inputs, "inter": neurons}
        self.reads_values = settings.rule == "threshold"

    @property
    def sites(self) -> dict[str, SiteRule]:
        return dict.fromkeys(self.kept_shares, SiteRule(rule=self._settings.rule))

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        share = self.kept_shares[site]
        if self.reads_values:
            return layer_threshold(layer, site, 1 - share)
        return Fitted({"kept_share": torch.tensor([share], device=layer.device)})
