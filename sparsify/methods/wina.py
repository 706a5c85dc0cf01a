"""WINA (arXiv 2505.19427): every projection reads those of its inputs that it multiplies by large weights.

Of the n elements of a projection's input, a token keeps the share `1 - target_zeros` with the largest |x_i| · |W_i|, W_i being the
column of the projection's matrix that x_i is multiplied by. Where the columns are orthogonal no other choice of so many elements
leaves a smaller error |W(x - masked x)|; `transform` turns the inputs of a layer so that they are for the key and gate projections.
"""

from __future__ import annotations

import torch
from pydantic import Field

from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.sites import column_norms, principal_axes
from sparsify.models import SiteRule

TURNED_FOR = {"attn_in": "k_proj", "ffn_in": "gate_proj"}
"""The projection whose columns are orthogonal after the transform of a site."""


class WinaSettings(MethodSettings):
    target_zeros: float = Field(
        ge=0, lt=1, description="Share of every projection's input that is dropped, such as 0.5; 0 changes nothing."
    )
    transform: bool = Field(
        default=False,
        description="Whether to rotate the layer's inputs so that columns of key and gate are orthogonal.",
    )


@register
class Wina:
    name = "wina"
    paper = "arXiv 2505.19427"
    Settings = WinaSettings
    reconstructs = False
    reads_values = False

    def __init__(self, settings: WinaSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        alone = SiteRule(rule="top_k", weighted=True)
        if self._settings.transform and self._settings.target_zeros:  # a rotation that masks nothing would only round
            turned = SiteRule(rule="top_k", weighted=True, rotated=True)
            return {"attn_in": turned, "attn_out": alone, "ffn_in": turned, "inter": alone}
        inputs = ("attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "ffn_in.gate", "ffn_in.up", "inter")
        return dict.fromkeys(inputs, alone)

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        weights, parts = layer.weights(site), {}
        if self.sites[site].rotated:
            # The right singular vectors of a matrix are the eigenvectors of its Gram matrix. All experts share one rotation.
            gram = sum(matrix.double().T @ matrix.double() for matrix in weights[TURNED_FOR[site]])
            assert isinstance(gram, torch.Tensor)
            parts["basis"] = basis = principal_axes(gram)
            weights = {name: [matrix @ basis for matrix in matrices] for name, matrices in weights.items()}
        norms = column_norms(weights)
        if site == "ffn_in" or site.startswith("attn"):  # one mask, whatever the number of experts
            norms = norms.square().sum(0).sqrt()
        kept = torch.tensor([1 - self._settings.target_zeros], device=layer.device)
        return Fitted(parts | {"weight": norms, "kept_share": kept})
