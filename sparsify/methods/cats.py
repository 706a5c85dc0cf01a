"""CATS (arXiv 2404.08763): in every layer the smallest factors of the gate become exact zeros, below one threshold of the layer.

The threshold t is the quantile of |g| at the wanted share, g = act(W_gate x), over the calibration tokens and the layer's neurons:
g is set to zero where |g| <= t. Then row i of W_up and column i of W_down need not be read.
"""

from __future__ import annotations

from sparsify.methods.base import register
from sparsify.methods.pooled import OneThreshold


@register
class Cats(OneThreshold):
    name = "cats"
    paper = "arXiv 2404.08763"
    site = "gate"
