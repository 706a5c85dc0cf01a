"""The sites of a layer: the vectors that a mask can multiply, what dropping their elements saves, and their values.

With hidden size d, f neurons, and a share ρ of a site's elements kept, a SwiGLU block reads of its 3·d·f weights:

| site       | masked vector                        | weights that need not be read            | block's weight density   |
|------------|--------------------------------------|------------------------------------------|--------------------------|
| `attn_in`  | input of q, k and v                  | columns of W_q, W_k, W_v                 | 1                        |
| `attn_out` | input of o                           | columns of W_o                           | 1                        |
| `ffn_in`   | input of gate and up                 | columns of W_gate, W_up                  | (2ρ + 1) / 3             |
| `gate`     | the gate's factor                    | rows of W_up, columns of W_down          | (1 + 2ρ) / 3             |
| `up`       | the up factor                        | rows of W_gate, columns of W_down        | (1 + 2ρ) / 3             |
| `inter`    | the product                          | columns of W_down                        | (2 + ρ) / 3              |
| by proxy   | the product                          | rows of W_gate, W_up, columns of W_down  | 0.19 + ρ                 |
| `group`    | groups of neurons, by a router       | rows of W_gate, W_up, columns of W_down  | ρ + 1 / (3 group_size)   |

`attn_in.q`, `attn_in.k`, `attn_in.v`, `ffn_in.gate` and `ffn_in.up` mask what one projection reads, each by itself.

In a mixture of experts the router sees its input unmasked, and `ffn_in` is one mask for all experts of a token; `ffn_in.gate` and
`ffn_in.up` may differ between experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from sparsify.methods.base import Fitted, Mask, SiteValues
from sparsify.methods.layer_expert import Expert, Routes, ffn_output
from sparsify.methods.layerwise import ATTENTION_SITES, Inputs, InputsOf, as_stored
from sparsify.models import SiteRule
from sparsify.models.masking import ALL_SITES, READERS

MaskParts = Mapping[str, Mapping[str, torch.Tensor]]
Parts = dict[str, dict[str, torch.Tensor]]
"""What is stored of each masked site of a layer, by the names of `models.masking.site_parts`."""


class BlockValues:
    """The values of a feed-forward block's sites, from calibration inputs (`methods.base.LayerValues`)."""

    def __init__(self, experts: list[Expert], inputs: InputsOf, rules: Mapping[str, SiteRule]) -> None:
        self.experts, self._inputs, self._rules = experts, inputs, rules
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
                    sizes = expert.proxy_sizes(x) if self._ranks_by_proxy(site) else None
                    yield SiteValues(_values(site, expert, x), weight, number, expert, sizes)

    def _ranks_by_proxy(self, site: str) -> bool:
        return site in self._rules and self._rules[site].by_proxy

    def weights(self, site: str) -> dict[str, list[torch.Tensor]]:
        return {name: [expert.weight(name) for expert in self.experts] for name in READERS.get(site, ())}

    def output(self, masks: MaskParts, num_tokens: int) -> torch.Tensor:
        experts = with_masks(self.experts, self._rules, masks)
        outputs: list[torch.Tensor] = []
        for chunk in self._inputs():
            chosen = torch.where(chunk.fit)[0][:num_tokens]
            routes = Routes(chunk.routes.experts[chosen], chunk.routes.weights[chosen])
            outputs.append(ffn_output(chunk.x[chosen], routes, experts))
            num_tokens -= len(chosen)
            if not num_tokens:
                break
        return torch.cat(outputs)


def with_masks(
    experts: list[Expert], rules: Mapping[str, SiteRule], masks: MaskParts, *, is_turned: bool = False
) -> list[Expert]:
    """Experts with masks on sites of their block: parts by site, those of all experts together. `is_turned` as of `Expert.with_mask`."""
    for site in (site for site in ALL_SITES if site in masks and site not in ATTENTION_SITES):
        owns = [{part: _own(part, values, n) for part, values in masks[site].items()} for n in range(len(experts))]
        pairs = zip(experts, owns, strict=True)
        experts = [expert.with_mask(site, rules[site], own, is_turned=is_turned) for expert, own in pairs]
    return experts


def _values(site: str, expert: Expert, x: torch.Tensor) -> torch.Tensor:
    if site == "gate":
        return expert.gates(x)
    if site == "up":
        return expert.ups(x)
    return expert.neurons(x) if site == "inter" else x


def rows_of(chunk: Inputs, number: int, part: str = "fit") -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of one expert that belong to a part, and their router weights. [rows] each"""
    token, weight = chunk.routes.of(number)
    counted = getattr(chunk, part)[token]
    return token[counted], weight[counted]


def column_norms(weights: Mapping[str, list[torch.Tensor]]) -> torch.Tensor:
    """Norm of the weights that a channel of a site is multiplied by, in all projections that read it: [experts, channels].

    Args:
        weights: As `LayerValues.weights` gives them.
    """
    energies = [torch.stack([matrix.square().sum(0) for matrix in own]) for own in zip(*weights.values(), strict=True)]
    return torch.stack([energy.sum(0) for energy in energies]).sqrt()


def principal_axes(gram: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of a symmetric matrix [channels, channels], those of the largest eigenvalues first, one in each column.

    They are orthogonal whatever the matrix's rank is. Computed in float64, returned in float32.
    """
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1).float().contiguous()


def fit_block(
    mask: Mask, experts: list[Expert], inputs: InputsOf, dtype: torch.dtype
) -> tuple[list[Expert], Parts, dict[str, Any]]:
    """Fits a mask to the sites of a feed-forward block, in the order in which it computes them.

    Returns:
        The experts with the mask, rounded as it will be stored; what is to be stored; and what is to be recorded.
    """
    record: dict[str, Any] = {}
    stored: Parts = {}
    for site in (site for site in ALL_SITES if site in mask.sites and site not in ATTENTION_SITES):
        fitted: Fitted = mask.fit(site, BlockValues(experts, inputs, mask.sites))
        record |= fitted.record
        parts = as_stored(fitted.parts, dtype)
        stored[site] = parts
        if fitted.order is not None:
            experts = [reordered(expert, own) for expert, own in zip(experts, fitted.order, strict=True)]
        experts = with_masks(experts, mask.sites, {site: parts})
        if "basis" in parts:
            experts = [_rounded(expert, dtype) for expert in experts]
    if len(experts) == 1:  # a dense block stores them without a dimension for experts
        stored = {
            site: {part: _own(part, values, 0) for part, values in parts.items()} for site, parts in stored.items()
        }
    return experts, stored, record


def reordered(expert: Expert, order: torch.Tensor) -> Expert:
    """The expert with its neurons in another order, [neurons]: it computes the same. For experts without masks inside the block."""
    return replace(expert, gate=expert.gate[order], up=expert.up[order], down=expert.down[:, order].contiguous())


def _own(part: str, values: torch.Tensor, number: int) -> torch.Tensor:
    """The part of one expert, where it has one of its own."""
    is_matrix = part.rpartition(".")[2] in ("basis", "left", "right", "router")
    return values[number] if values.dim() > 1 + is_matrix else values


def _rounded(expert: Expert, dtype: torch.dtype) -> Expert:
    return replace(expert, gate=expert.gate.to(dtype).float(), up=expert.up.to(dtype).float())
