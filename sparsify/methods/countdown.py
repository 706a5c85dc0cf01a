"""M-COUNTDOWN (arXiv 2505.17701): in every layer the smallest up factors become exact zeros, below one threshold of the layer.

The threshold t is the quantile of |u| at the wanted share, u = W_up x, over the calibration tokens and the layer's neurons: u is set
to zero where |u| <= t. Then row i of W_gate and column i of W_down need not be read.
"""

from __future__ import annotations

from sparsify.methods.base import Fitted, LayerValues, register
from sparsify.methods.pooled import ZerosSettings, layer_threshold
from sparsify.models import SiteRule


@register
class Countdown:
    name = "countdown"
    paper = "arXiv 2505.17701"
    Settings = ZerosSettings
    reconstructs = False

    def __init__(self, settings: ZerosSettings) -> None:
        self._share = settings.target_zeros

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {"up": SiteRule(per="layer")}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        return layer_threshold(layer, site, self._share)
