"""M-COUNTDOWN (arXiv 2505.17701): in every layer the smallest up factors become exact zeros, below one threshold of the layer.

The threshold t is the quantile of |u| at the wanted share, u = W_up x, over the calibration tokens and the layer's neurons: u is set
to zero where |u| <= t. Then row i of W_gate and column i of W_down need not be read.
"""

from __future__ import annotations

from sparsify.methods.base import register
from sparsify.methods.pooled import OneThreshold


@register
class Countdown(OneThreshold):
    name = "countdown"
    paper = "arXiv 2505.17701"
    site = "up"
