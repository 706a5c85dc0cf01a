"""The sites of a layer: the vectors that a mask can multiply, what dropping their elements saves, and their values.

With hidden size d, f neurons, and a share ρ of a site's elements kept, a SwiGLU block reads of its 3·d·f weights:

| site       | masked vector                        | weights that need not be read            | block's weight density   |
|------------|--------------------------------------|------------------------------------------|--------------------------|
| `attn_in`  | input of q, k and v                  | columns of W_q, W_k, W_v                 | 1                        |
| `attn_out` | input of o                           | columns of W_o                           | 1                        |
| `ffn_in`   | input of gate and up                 | columns of W_gate, W_up                  | (2ρ + 1) / 3             |
| `gate`     | the gate's factor                    | rows of W_up, columns of W_down          | (1 + 2ρ) / 3             |
| `inter`    | the product                          | columns of W_down                        | (2 + ρ) / 3              |

In a mixture of experts the router sees its input unmasked, and `ffn_in` is one mask for all experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparsify.methods.base import Fitted, Mask, SiteValues
from sparsify.methods.layerwise import Expert, Inputs, InputsOf, stored_threshold
from sparsify.models import SITES

ATTENTION_SITES = ("attn_in", "attn_out")


class BlockValues:
    """The values of a feed-forward block's sites, from calibration inputs (`methods.base.LayerValues`)."""

    def __init__(self, experts: list[Expert], inputs: InputsOf) -> None:
        self.experts, self._inputs = experts, inputs
        self.device = experts[0].down.device

    def values(self, site: str) -> Iterator[SiteValues]:
        for chunk in self._inputs():
            if site == "ffn_in":
                if chunk.fit.any():
                    x = chunk.x[chunk.fit]
                    yield SiteValues(x, x.new_ones(len(x)), 0, self.experts[0])
                continue
            for number, expert in enumerate(self.experts):
                token, weight = rows_of(chunk, number)
                if len(token):
                    x = chunk.x[token]
                    values = expert.gates(x) if site == "gate" else expert.neurons(x)
                    yield SiteValues(values, weight, number, expert)


def rows_of(chunk: Inputs, number: int, part: str = "fit") -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one expert that belong to a part, and their router weights. [rows] each"""
    token, weight = chunk.routes.of(number)
    counted = getattr(chunk, part)[token]
    return token[counted], weight[counted]


def fit_block(
    mask: Mask, experts: list[Expert], inputs: InputsOf, dtype: torch.dtype
) -> tuple[list[Expert], dict[str, float]]:
    """Fits a mask to the sites of a feed-forward block, in the order in which it computes them.

    Returns:
        The experts with the mask, rounded as it will be stored; and what is to be recorded.
    """
    record: dict[str, float] = {}
    for site in (site for site in SITES if site in mask.sites and site not in ATTENTION_SITES):
        fitted: Fitted = mask.fit(site, BlockValues(experts, inputs))
        record |= fitted.record
        threshold = stored_threshold(fitted.threshold, dtype)
        experts = [
            expert.with_mask(site, threshold[number] if threshold.dim() > 1 else threshold)
            for number, expert in enumerate(experts)
        ]
    return experts, record


def block_thresholds(mask: Mask, experts: list[Expert]) -> dict[str, torch.Tensor]:
    """The thresholds of a block's sites as they are stored: of all experts together where each has its own."""
    found = {}
    for site, rule in mask.sites.items():
        if site in ATTENTION_SITES:
            continue
        own = [_threshold(expert, site) for expert in experts]
        of_all = rule.per == "layer" or site == "ffn_in" or len(own) == 1
        found[site] = own[0] if of_all else torch.stack(own)
    return found


def _threshold(expert: Expert, site: str) -> torch.Tensor:
    activation = expert.activation
    if site == "gate" and activation.gate_mask is not None:
        return activation.gate_mask.threshold
    found = {"ffn_in": expert.input_threshold, "inter": activation.threshold}.get(site)
    assert found is not None, site
    return found
