"""Training of routers of groups, in two stages (LTE, arXiv 2402.06126, section 3).

Stage 1, soft: a block computes sum_i G_i E_i(x), G = sigmoid(score) of group i. To the loss is added

    eta · mean(G²) + lambda · mean(1 / max((G - threshold)², CLAMP)),

the mean over tokens, groups and layers; in a mixture of experts over the tokens that each expert gets, weighted by the mixture's own
router. The first term switches groups off, the second keeps scores away from the threshold, so that nothing jumps when groups
become hard. It has a pole there, which CLAMP cuts off. Stage 2, hard: a group is computed, with weight 1, where G exceeds the threshold;
routers are frozen and neither term is added.

Ours: lambda is 0 for the first RAMP_SHARE of stage 1, and rises in a straight line to its weight at the end of it, since a barrier at the
threshold from the first step on would hold every score on the side on which it began. And eta may follow from the wanted share of active
groups (`controller.py`, with stage 1 as its way). What counts as on in a step is the mean of the share of active groups and of G: the
share alone does not move until scores reach the threshold, and is G's mean once they are separated.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from sparsify.errors import RecipeError
from sparsify.methods.controller import RAMP_SHARE, Controller
from sparsify.methods.live_model import ForwardMeter
from sparsify.methods.objective import MicroBatch, Objective, TrainingRun, objective
from sparsify.models import SparseModel, site_rules
from sparsify.models.group_router import GroupRouter
from sparsify.models.masking import GROUP, is_fused
from sparsify.recipe.recipe import Recipe

CLAMP = 1e-4
"""Least squared distance from the threshold that the separability term counts."""
UNDECIDED = 0.1
"""Distance from the threshold within which a score counts as undecided."""
FIRST_LOSS_SHARE = 0.03
"""The efficiency term begins at this share of the loss."""
LIMIT = 100.0
"""Of the efficiency weight, as a factor of the first one: the term stays below three times the loss."""


def efficiency(gates: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of G² over rows and groups. []

    Args:
        gates: sigmoid(score), [rows, groups].
        weights: Of the rows; None for 1 each.
    """
    return _mean(gates.square(), weights)


def separability(gates: torch.Tensor, threshold: float, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of 1 / max((G - threshold)², CLAMP) over rows and groups, []; arguments as of `efficiency`."""
    return _mean(1 / (gates - threshold).square().clamp_min(CLAMP), weights)


def separation(progress: float) -> float:
    """How much of the separability's weight is in force at this part of stage 1."""
    return max(0.0, progress - RAMP_SHARE) / (1 - RAMP_SHARE)


def _mean(values: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    by_row = values.mean(-1)
    return by_row.mean() if weights is None else (by_row * weights).sum() / weights.sum()


@dataclass(frozen=True)
class GroupRecord:
    """What the routers of groups did in one step, over all ranks.

    Attributes:
        active: Share of groups that were on in each layer, where groups are hard, or would be. [layers]
        mean_gate: Mean of sigmoid(score).
        undecided: Share of groups whose sigmoid(score) was within UNDECIDED of the threshold.
        empty_tokens: Share of tokens, of each layer, for which no group was on; in a mixture, in any of their experts.
        efficiency: The term before its weight.
        separability: The same.
    """

    active: list[float]
    mean_gate: float
    undecided: float
    empty_tokens: float
    efficiency: float
    separability: float


class GroupMeter(ForwardMeter):
    """Takes both terms of a model's forward passes while it is on.

    Args:
        model: With routers of groups in every layer.
        soft: Whether both terms are wanted with their gradients.
    """

    def __init__(self, model: SparseModel, device: torch.device, *, soft: bool) -> None:
        super().__init__(model)
        self._soft, self._device = soft, device
        self._layers = len(model.ffn_blocks())
        # For each layer: weighted sums of both terms, and the weights. With gradients.
        self._sums: list[list[torch.Tensor]] = [[] for _ in range(self._layers)]
        self._nothing: list[torch.Tensor] = []
        self._calls: deque[torch.Tensor] = deque()
        # Groups, those on, those undecided; rows, those without any; sum of sigmoid(score).
        self._counts = torch.zeros(self._layers, 6, dtype=torch.float64, device=device)
        self._totals = torch.zeros(3, dtype=torch.float64, device=device)

    def _watch(self) -> Iterator[RemovableHandle]:
        for layer, block in enumerate(self._model.ffn_blocks()):
            if is_fused(block):
                yield block.register_forward_pre_hook(self._read_routing, with_kwargs=True)
            yield block.group_router.register_forward_hook(partial(self._take_layer, layer))

    def terms(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Efficiency and separability of the forward pass that has just ended, with their gradients. [] each"""
        layers = [torch.stack(sums).sum(0) for sums in self._sums if sums]
        means = torch.stack([sums[:2] / sums[2].clamp_min(1e-12) for sums in layers]).mean(0)
        self._totals += torch.cat([means.detach().double(), means.new_ones(1).double()])
        return means[0], means[1]

    def nothing(self) -> torch.Tensor:
        """0 with a gradient of 0 to every router that ran: engines do not expect parameters without one. []"""
        return torch.stack(self._nothing).sum()

    def reduce(self) -> GroupRecord:
        numbers = torch.cat([self._counts.flatten(), self._totals])
        dist.all_reduce(numbers)
        counts, (efficient, separable, passes) = numbers.split([self._counts.numel(), 3])
        counts = counts.view_as(self._counts)
        groups, _, undecided, rows, empty, gates = counts.sum(0).tolist()
        return GroupRecord(
            active=[round(one, 5) for one in (counts[:, 1] / counts[:, 0].clamp_min(1)).tolist()],
            mean_gate=gates / max(groups, 1),
            undecided=undecided / max(groups, 1),
            empty_tokens=empty / max(rows, 1),
            efficiency=float(efficient / passes.clamp_min(1)),
            separability=float(separable / passes.clamp_min(1)),
        )

    def _begin(self) -> None:
        self._sums, self._nothing = [[] for _ in range(self._layers)], []

    def _end(self) -> None:
        self._calls.clear()

    def _read_routing(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        index, weights = (
            kwargs.get(name, args[place] if place < len(args) else None)
            for place, name in ((1, "top_k_index"), (2, "top_k_weights"))
        )
        # One call for each expert that has tokens, in ascending order.
        self._calls = deque(weights[torch.where(index == expert)].detach() for expert in torch.unique(index).tolist())

    def _take_layer(self, layer: int, router: GroupRouter, _: object, scores: torch.Tensor) -> None:
        scores = scores.flatten(0, -2)
        weights = self._calls.popleft().to(scores.dtype) if self._calls else scores.new_ones(len(scores))
        if self._soft:
            gates, threshold = scores.sigmoid(), float(router.threshold)
            terms = torch.stack(
                [efficiency(gates, weights), separability(gates, threshold, weights), weights.new_ones(())]
            )
            sums = terms * weights.sum()
        else:
            sums = scores.sum() * 0.0
        if not self._in_forward:
            return
        (self._sums[layer] if self._soft else self._nothing).append(sums)
        with torch.no_grad():
            on = router.kept(scores)
            self._counts[layer] += torch.stack(
                [
                    scores.new_tensor(scores.numel()).double(),
                    on.sum().double(),
                    self._undecided(router, scores).double(),
                    scores.new_tensor(len(scores)).double(),
                    (~on.any(-1)).sum().double(),
                    scores.sigmoid().sum(dtype=torch.float64),
                ]
            )

    @staticmethod
    def _undecided(router: GroupRouter, scores: torch.Tensor) -> torch.Tensor:
        if router.rule.rule != "router":
            return scores.new_zeros(())
        return ((scores.sigmoid() - router.threshold.to(scores.dtype)).abs() < UNDECIDED).sum()


@objective
class GroupRouting(Objective):
    """Both stages of a run whose model has routers of groups. Without a first stage routers are frozen from the start."""

    name: ClassVar[str] = "group_routing"

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._settings = run, run.recipe.group_routing
        self._controller: Controller | None = None
        self._weights = (0.0, 0.0)
        self._was_soft = False
        self._meter = self._new_meter()

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        return cls(run) if GROUP in site_rules(run.engine.module.config) else None

    @property
    def _is_soft(self) -> bool:
        return self._run.state.seen_tokens < self._settings.soft_tokens

    @property
    def _progress(self) -> float:
        """How much of stage 1 is done."""
        return min(1.0, self._run.state.seen_tokens / max(self._settings.soft_tokens, 1))

    @contextmanager
    def step(self) -> Iterator[None]:
        self._was_soft = soft = self._is_soft
        set_soft(self._run.engine.module, soft)
        # Without a rate nothing moves a parameter: neither decay nor what Adam remembers of stage 1.
        routers = self._run.engine.optimizer.param_groups[-1]
        routers["lr"] = routers["lr"] * self._settings.learning_rate_factor if soft else 0.0
        self._weights = (self._efficiency_weight(), self._settings.separability_weight * separation(self._progress))
        self._meter = self._new_meter()
        with self._meter:
            yield

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        if not self._was_soft:
            return self._meter.nothing()
        terms = self._meter.terms()
        return (self._weights[0] * terms[0] + self._weights[1] * terms[1]) / batch.per_step

    def after_step(self, loss: float) -> dict[str, Any]:
        """Each term in nats as it was added to the loss, next to what a GroupRecord says."""
        record = self._meter.reduce()
        line = asdict(record)
        share = sum(record.active) / len(record.active)
        line = {"active_share": share} | line
        if not self._was_soft:
            return {
                self.name: {"stage": "hard"}
                | {k: v for k, v in line.items() if k not in ("efficiency", "separability")}
            }
        if self._settings.active_share is not None:
            self._controller = self._next_controller((share + record.mean_gate) / 2, loss, record.efficiency)
        added = self._weights[0] * record.efficiency + self._weights[1] * record.separability
        return {self.name: {"stage": "soft", "efficiency_weight": self._weights[0], "added": added} | line}

    def before_validation(self) -> dict[str, Any]:
        soft = self._is_soft
        set_soft(self._run.engine.module, soft)
        return {"label": "soft routing"} if soft else {}

    @contextmanager
    def as_saved(self) -> Iterator[None]:
        model = self._run.engine.module
        before = [block.group_router.soft for block in model.ffn_blocks()]
        set_soft(model, False)
        try:
            yield
        finally:
            for block, soft in zip(model.ffn_blocks(), before, strict=True):
                block.group_router.soft = soft

    def state(self) -> dict[str, Any]:
        return {} if self._controller is None else self._controller.saved()

    def load_state(self, state: dict[str, Any]) -> None:
        self._controller = Controller(**state) if state else None

    def _new_meter(self) -> GroupMeter:
        engine = self._run.engine
        return GroupMeter(engine.module, engine.device, soft=self._was_soft)

    def _efficiency_weight(self) -> float:
        target = self._settings.active_share
        if target is None:
            return self._settings.efficiency_weight or 0.0
        return 0.0 if self._controller is None else self._controller.weight(target, self._progress)

    def _next_controller(self, level: float, loss: float, term: float) -> Controller:
        target = self._settings.active_share
        assert target is not None
        if self._controller is None:
            return Controller(FIRST_LOSS_SHARE * loss / max(term, 1e-12), LIMIT, level, level)
        step = self._run.recipe.step_tokens / self._settings.soft_tokens
        return self._controller.after_step(target, level, self._progress, step)


def set_soft(model: SparseModel, soft: bool) -> None:
    """Whether every block's groups are multiplied by sigmoid(score), or on and off."""
    for block in model.ffn_blocks():
        block.group_router.soft = soft


def check_routers(recipe: Recipe, config: Any) -> None:
    """Refuses settings of routers of groups that the model does not have, once the checkpoint is known.

    Raises:
        RecipeError: Naming the setting.
    """
    rules = site_rules(config)
    routing = recipe.group_routing
    if routing.soft_tokens and (GROUP not in rules or rules[GROUP].rule != "router"):
        found = f"chooses groups by {rules[GROUP].rule}" if GROUP in rules else "stores no router of groups"
        raise RecipeError(
            f"group_routing.soft_tokens is {routing.soft_tokens}, and the model {found}.",
            allowed="Routers that conversion.method=lte makes, or a source that stores such.",
            next_step="Set conversion.method=lte and conversion.calibration_tokens, or omit it.",
        )
    if recipe.training.compile and GROUP in rules:
        raise RecipeError(
            "training.compile is set, and the model has routers of groups, which need forward hooks on every layer; torch.compile "
            "bypasses them.",
            next_step="Set training.compile=false.",
        )
