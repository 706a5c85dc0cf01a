"""Top-p on a site (arXiv 2509.00454): every token keeps the fewest elements whose magnitudes make up a share p of their sum.

So a token whose magnitudes are even keeps more elements than one with a few large ones. p is one number of the layer, with which the
calibration tokens have the wanted mean share of zeros. An element is kept where those of its token that are larger make up less than
p of the sum; so p is a quantile of that part over elements.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.histogram import PIECE_VALUES, Bins, Histogram
from sparsify.methods.pooled import ZerosSettings
from sparsify.models import SiteRule

MASS_BINS = Bins("linear", lowest=0.0, per_unit=100_000, num_bins=100_000)


class TopPSettings(ZerosSettings):
    site: Literal["inter", "gate", "up", "ffn_in"] = Field(
        default="inter",
        description="inter, the product of both factors, gate or up, a factor, or ffn_in, the input of the block.",
    )


@register
class TopP:
    name = "top_p"
    paper = "arXiv 2509.00454"
    Settings = TopPSettings
    reconstructs = False

    def __init__(self, settings: TopPSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {self._settings.site: SiteRule(rule="top_p")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        kept = 1 - self._settings.target_zeros
        dropped = 0.0
        if kept < 1:
            parts = Histogram(MASS_BINS, device=layer.device)
            for chunk in layer.values(site):
                for rows in chunk.values.split(max(1, PIECE_VALUES // chunk.values.shape[1])):
                    parts.add(larger_part(rows))
            # Not all of it: the largest element is always kept.
            dropped = 1 - max(parts.quantile(kept), MASS_BINS.edge(1))
        record = {f"{site}_kept_mass": 1 - dropped} if dropped else {}
        return Fitted({"dropped_mass": torch.tensor([dropped], device=layer.device)}, record)


def larger_part(rows: torch.Tensor) -> torch.Tensor:
    """The part of the sum of a row's magnitudes that those before it in descending order make up, [rows, channels], so ordered.

    0 in a row of zeros.
    """
    ordered = rows.abs().sort(dim=-1, descending=True).values
    before = ordered.cumsum(-1) - ordered
    return before / ordered.sum(-1, keepdim=True).clamp(min=torch.finfo(ordered.dtype).tiny)
