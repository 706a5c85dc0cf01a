"""Routers of groups: a linear layer in front of a feed-forward block decides which groups of its neurons a token needs.

The site `group` is masked by one of two rules. The neurons of a block are cut into groups of `group_size` neighbours. With a stored matrix
and bias, a group's score for the block's input x is s = W x + b, computed in fp32 whatever the model's dtype is:

- `router` keeps a group where sigmoid(s) exceeds a stored threshold (LTE, arXiv 2402.06126);
- `router_top_k` keeps a stored share of the groups, at least one: those with the largest scores.

Of a group that is dropped no row of gate and up and no column of down need be read. In fused experts every expert has its own scores.
NaN scores keep their group, so that they show.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .masking import SiteRule, kept_count, largest, of_experts


class GroupRouter(nn.Module):
    """Says which groups of neurons each token keeps. It keeps everything until its tensors are filled.

    Its matrix and bias are parameters, since methods train them; the number that scores are compared with is a buffer.

    Attributes:
        router: [groups, hidden], or [experts, groups, hidden].
        bias: [groups], or [experts, groups].
        threshold: What sigmoid(score) must exceed, [1]; of the rule `router`.
        kept_share: Share of the groups that is kept, [1]; of the rule `router_top_k`.
        soft: Whether neurons are multiplied by sigmoid(score) instead of being dropped: while a router is trained, never stored.
    """

    threshold: torch.Tensor
    kept_share: torch.Tensor
    soft: bool = False

    def __init__(self, rule: SiteRule, parts: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.rule = rule
        self.router = nn.Parameter(torch.zeros(parts["router"]))
        self.bias = nn.Parameter(torch.zeros(parts["bias"]))
        number = "kept_share" if rule.rule == "router_top_k" else "threshold"
        self.register_buffer(number, torch.full(parts[number], float(number == "kept_share")))

    def forward(self, x: torch.Tensor, experts: int | None = None) -> torch.Tensor:
        """Scores of the groups, [..., groups] in fp32, or in fp64 where x or the router is.

        Args:
            x: Inputs of the block, [..., hidden]; of one expert, those of the tokens that are routed to it.
            experts: The expert of all rows. Needed for routers of experts.
        """
        router, bias = of_experts(self.router, 2, experts), of_experts(self.bias, 1, experts)
        wide = torch.promote_types(torch.promote_types(x.dtype, router.dtype), torch.float32)
        return nn.functional.linear(x.to(wide), router.to(wide), bias.to(wide))

    def factors(self, scores: torch.Tensor) -> torch.Tensor:
        """What a token's groups are multiplied by, of the shape of scores: bool, and while it is `soft` sigmoid(score)."""
        return scores.sigmoid() if self.soft else self.kept(scores)

    def kept(self, scores: torch.Tensor) -> torch.Tensor:
        """Which groups are kept, bool of the shape of scores."""
        if self.rule.rule == "router_top_k":
            return largest(scores, kept_count(float(self.kept_share), scores.shape[-1])) | scores.isnan()
        return (scores.sigmoid() <= self.threshold.to(scores.dtype)).logical_not()

    def of_expert(self, expert: int) -> GroupRouter:
        """The router of one expert, on the same tensors."""
        parts = {"router": of_experts(self.router, 2, expert), "bias": of_experts(self.bias, 1, expert)}
        return GroupRouter.holding(self.rule, dict(self._buffers) | parts)  # pyright: ignore[reportArgumentType]

    @classmethod
    def holding(cls, rule: SiteRule, parts: Mapping[str, torch.Tensor]) -> GroupRouter:
        """A router with these tensors, by their names; they are not copied, and not trained by way of it."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.rule = rule
        for name, values in parts.items():
            made.register_buffer(name, values.detach())
        return made


def apply_groups(product: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Neuron activations [..., neurons] under what a `GroupRouter` says of their groups, [..., groups]; of the shape of `product`.

    The neurons of dropped groups are zero whatever they are: nothing computes them.
    """
    grouped = product.unflatten(-1, (factors.shape[-1], -1))
    factors = factors[..., None]
    if factors.dtype == torch.bool:
        return torch.where(factors, grouped, 0.0).flatten(-2)
    return (grouped * factors).to(product.dtype).flatten(-2)
