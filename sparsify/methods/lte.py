"""LTE, Learn To be Efficient (arXiv 2402.06126): a router in front of every block learns which groups of neurons a token needs.

The neurons of a block are cut into groups of similar gate rows by balanced K-means, and stored group by group, which changes nothing that
the block computes. A linear layer with a sigmoid scores the groups from the block's input: G = sigmoid(R x + b). The conversion makes the
routers so that G is about `start_gate` everywhere: every group is kept, and the model is the dense one. Training does the rest
(`lte_training.py`).

The paper does not say how routers begin. Here a router's rows are the means of its groups' gate rows, scaled so that the scores of a group
have the standard deviation `start_spread` over the calibration tokens, with biases that put their mean at `start_gate`.

An untrained choice of as many groups, which LTE is compared with, is `group_topk`: the groups whose mean gate row has the largest product
with the input, as many for every token.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from sparsify.methods.balanced_kmeans import balanced_kmeans, random_groups, within
from sparsify.methods.base import Fitted, LayerValues, MethodSettings, register
from sparsify.methods.layer_expert import Expert
from sparsify.methods.pooled import ZerosSettings
from sparsify.models import SiteRule
from sparsify.models.masking import GROUP

Grouping = Literal["kmeans", "random"]
SIZE_WORDS = "Neurons in one group, a divisor of the neurons of a block (of an expert); 32 in the paper."
GROUPING_WORDS = "kmeans, balanced K-means over gate rows, or random, groups of any neurons: the ablation."


class LteSettings(MethodSettings):
    group_size: int = Field(default=32, ge=1, description=SIZE_WORDS)
    grouping: Grouping = Field(default="kmeans", description=GROUPING_WORDS)
    threshold: float = Field(
        default=0.5, gt=0, lt=1, description="What sigmoid(score) must exceed, above 0 and below 1; 0.5 in the paper."
    )
    start_gate: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        validate_default=True,
        description="Sigmoid of a group's mean score before training, above the threshold and below 1.",
    )
    start_spread: float = Field(
        default=0.5, ge=0, le=10, description="Standard deviation of a group's scores before training, 0 to 10."
    )

    @field_validator("start_gate")
    @classmethod
    def _starts_open(cls, value: float, info: ValidationInfo) -> float:
        threshold = info.data.get("threshold", 0.0)
        if value <= threshold:
            raise PydanticCustomError(
                "starts_closed", "it must exceed the threshold, {threshold}", {"threshold": threshold}
            )
        return value


class GroupTopKSettings(ZerosSettings):
    group_size: int = Field(default=32, ge=1, description=SIZE_WORDS)
    grouping: Grouping = Field(default="kmeans", description=GROUPING_WORDS)


def group_order(expert: Expert, size: int, grouping: Grouping) -> torch.Tensor:
    """The order of an expert's neurons in which each `size` neighbours are a group, int64 [neurons]."""
    if grouping == "random":
        return random_groups(len(expert.gate)).to(expert.gate.device)
    return balanced_kmeans(expert.gate, size)


def group_means(expert: Expert, order: torch.Tensor, size: int) -> torch.Tensor:
    """The mean gate row of each group, [groups, hidden]."""
    return expert.gate[order].unflatten(0, (-1, size)).mean(1)


def cluster_spread(expert: Expert, order: torch.Tensor, size: int) -> float:
    """How far gate rows are from the means of their groups: the mean square, as a part of that in random groups."""
    random = within(expert.gate, random_groups(len(order)).to(order.device), size)
    return within(expert.gate, order, size) / max(random, 1e-30)


@register
class Lte:
    name = "lte"
    paper = "arXiv 2402.06126"
    Settings = LteSettings
    reconstructs = False

    def __init__(self, settings: LteSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {GROUP: SiteRule(rule="router", group_size=self._settings.group_size)}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        settings = self._settings
        orders = [group_order(expert, settings.group_size, settings.grouping) for expert in layer.experts]
        means = [
            group_means(expert, order, settings.group_size) for expert, order in zip(layer.experts, orders, strict=True)
        ]
        routers, biases = [], []
        for rows, (mean, deviation) in zip(means, _score_moments(layer, site, means), strict=True):
            scale = settings.start_spread / deviation
            routers.append(rows * scale[:, None])
            biases.append(math.log(settings.start_gate / (1 - settings.start_gate)) - mean * scale)
        spread = [
            cluster_spread(expert, order, settings.group_size)
            for expert, order in zip(layer.experts, orders, strict=True)
        ]
        parts = {
            "router": torch.stack(routers),
            "bias": torch.stack(biases),
            "threshold": torch.tensor([settings.threshold], device=layer.device),
        }
        return Fitted(parts, {"group_spread": spread}, torch.stack(orders))


@register
class GroupTopK:
    name = "group_topk"
    paper = "none: the untrained baseline of lte"
    Settings = GroupTopKSettings
    reconstructs = False
    reads_values = False

    def __init__(self, settings: GroupTopKSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {GROUP: SiteRule(rule="router_top_k", group_size=self._settings.group_size)}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        size = self._settings.group_size
        orders = [group_order(expert, size, self._settings.grouping) for expert in layer.experts]
        rows = [group_means(expert, order, size) for expert, order in zip(layer.experts, orders, strict=True)]
        router = torch.stack(rows)
        parts = {
            "router": router,
            "bias": router.new_zeros(router.shape[:2]),
            "kept_share": torch.tensor([1 - self._settings.target_zeros], device=layer.device),
        }
        return Fitted(parts, {}, torch.stack(orders))


def _score_moments(layer: LayerValues, site: str, rows: list[torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Mean and standard deviation of rows @ x over the calibration tokens of each expert, [groups] each; in float64, given in float32.

    An expert without tokens has those of unit inputs.
    """
    sums = [torch.zeros(3, len(own), dtype=torch.float64, device=layer.device) for own in rows]
    for chunk in layer.values(site):
        scores = (chunk.values @ rows[chunk.number].T).double()
        sums[chunk.number] += torch.stack([torch.ones_like(scores).sum(0), scores.sum(0), scores.square().sum(0)])
    found = []
    for own, (count, total, squares) in zip(rows, sums, strict=True):
        mean = total / count.clamp_min(1)
        variance = (squares / count.clamp_min(1) - mean.square()).clamp_min(0)
        variance = torch.where(count > 1, variance, own.double().square().sum(1))
        found.append((mean.float(), variance.sqrt().clamp_min(1e-6).float()))
    return found
