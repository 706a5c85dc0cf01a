"""Two-stage masks, as Prox (arXiv 2607.27591): int4 copies of gate and up rank the neurons, then the chosen ones are computed exactly.

The copies are those that decoding reads as int4 (`models/quantised.py`), products with them included. With their factors ĝ and û,
neuron i is dropped where |ĝ_i · û_i| does not exceed one number of its layer: the quantile of these products at the wanted share,
over the calibration tokens and the layer's neurons. Nothing is trained. Of what is dropped no exact row of W_gate and W_up and no column
of W_down is read; the copies are, 4.5 bits for each weight of W_gate and W_up.
"""

from __future__ import annotations

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.pooled import ZerosSettings, layer_threshold
from sparsify.models import SiteRule


@register
class Prox:
    name = "prox"
    paper = "arXiv 2607.27591"
    Settings = ZerosSettings
    reconstructs = False

    def __init__(self, settings: ZerosSettings) -> None:
        self._share = settings.target_zeros

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {"inter": SiteRule(by_proxy=self._share > 0)}  # copies that drop nothing would only be read

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        return layer_threshold(layer, site, self._share)
