"""Top-k on the product of the factors: every token keeps the same number of neurons of a block, those of the largest score.

The score is |h_i|, or |h_i| · |w_down,i|, the norm of what the neuron adds to the output. Both are known only when W_gate and W_up have
been read, so what it saves is columns of W_down: the floor that any choice made earlier is compared with.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.pooled import ZerosSettings
from sparsify.methods.sites import column_norms
from sparsify.models import SiteRule


class TopKSettings(ZerosSettings):
    score: Literal["magnitude", "output_norm"] = Field(
        default="magnitude",
        description="magnitude, |h|, or output_norm, |h| times the norm of the neuron's column of the down projection.",
    )


@register
class TopK:
    name = "topk"
    paper = "none: the usual baseline"
    Settings = TopKSettings
    reconstructs = False
    reads_values = False

    def __init__(self, settings: TopKSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {"inter": SiteRule(rule="top_k", weighted=self._settings.score == "output_norm")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        parts = {"kept_share": torch.tensor([1 - self._settings.target_zeros], device=layer.device)}
        if self._settings.score == "output_norm":
            parts["weight"] = column_norms(layer.weights(site))
        return Fitted(parts)
