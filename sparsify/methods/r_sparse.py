"""R-Sparse (arXiv 2504.19449): projections read the strongest of their inputs, and low-rank factors stand in for the rest.

A projection of `rows` outputs and `columns` inputs may read the share b = 1 - target_zeros of its weights: `alpha` b of them are whole
columns, the rest the factors of its singular value decomposition, of rank (1 - alpha) b · rows · columns / (rows + columns):

    y = W (x where kept) + left right (x where dropped)

An element is kept where |x_i| · |W_i| exceeds one number of the layer, |x_i| where alpha is 1.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.pooled import magnitudes
from sparsify.methods.sites import column_norms, principal_axes
from sparsify.methods.thresholds import TINY
from sparsify.models import SiteRule
from sparsify.models.masking import READERS

PROJECTIONS = ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "ffn_in.gate", "ffn_in.up")


class RSparseSettings(MethodSettings):
    target_zeros: float = Field(
        ge=0, lt=1, description="Share of every projection's weights that is not read, such as 0.5; 0 changes nothing."
    )
    alpha: float = Field(
        default=1.0, gt=0, le=1, description="Part of what is read that are columns; the rest are low-rank factors."
    )


@register
class RSparse:
    name = "r_sparse"
    paper = "arXiv 2504.19449"
    Settings = RSparseSettings
    reconstructs = False

    def __init__(self, settings: RSparseSettings) -> None:
        self._budget = 1 - settings.target_zeros
        self._alpha = settings.alpha if settings.target_zeros else 1.0  # nothing is dropped that factors could replace

    @property
    def sites(self) -> dict[str, SiteRule]:
        if self._alpha == 1:
            return dict.fromkeys(("attn_in", "attn_out", "ffn_in", "inter"), SiteRule())
        with_factors = SiteRule(per="channel", remainder="low_rank", rank_share=(1 - self._alpha) * self._budget)
        return dict.fromkeys(PROJECTIONS, with_factors) | {"inter": SiteRule()}

    @property
    def kept_shares(self) -> dict[str, float]:
        """Share of the elements that is kept at each site; what the factors hold is read on top."""
        return {site: self._budget * (1.0 if site == "inter" else self._alpha) for site in self.sites}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        rule, zeros = self.sites[site], 1 - self.kept_shares[site]
        if self._budget == 1:
            return Fitted({"threshold": torch.tensor([-math.inf], device=layer.device)})
        norms = column_norms(layer.weights(site)) if rule.per == "channel" else None
        scale = magnitudes(layer, site, norms).quantile(zeros)
        record = {f"{site} threshold": scale}
        if norms is None:
            return Fitted({"threshold": torch.tensor([scale], device=layer.device)}, record)
        (name,) = READERS[site]
        factors = [low_rank_factors(matrix, rule.rank_of(*matrix.shape)) for matrix in layer.weights(site)[name]]
        parts = {
            "threshold": scale / norms.clamp(min=TINY),
            f"{name}.left": torch.stack([left for left, _ in factors]),
            f"{name}.right": torch.stack([right for _, right in factors]),
        }
        if not layer.experts:  # the attention's parts have no dimension for experts
            parts = {part: values[0] for part, values in parts.items()}
        return Fitted(parts, record)


def low_rank_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The best approximation of a matrix [rows, columns] by a product: [rows, rank] and [rank, columns]."""
    wide = matrix.double()
    axes = principal_axes(wide.T @ wide)[:, :rank].double()
    return (wide @ axes).float(), axes.T.float().contiguous()
