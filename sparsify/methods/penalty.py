"""Sparsity regularisation: an L1 penalty on the neurons' activations, with a weight by stages or by a target.

The penalty is the mean of |activation| over tokens and neurons, summed over layers (arXiv 2402.13516, section 3.2), with a part of
it on the gate's factor alone where the recipe says so. In a mixture of experts the mean is over the tokens that were routed.

With a target for the share of zeros the weight follows what is measured, so that the run ends at the target (`controller.py`; what is
on are the neurons that fire).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from sparsify.methods.blending import is_blended
from sparsify.methods.controller import Controller
from sparsify.methods.live_model import ForwardMeter
from sparsify.methods.objective import MicroBatch, Objective, TrainingRun, objective
from sparsify.models import FfnActivation, SparseModel
from sparsify.recipe.sparsification import PenaltyStageSection


@dataclass(frozen=True)
class PenaltyRecord:
    """What was measured in one step, over all ranks and layers.

    Attributes:
        penalty: Before its weight: mean absolute activation of each layer, summed over layers.
        zeros: Share of products that were exactly zero.
        gate_zeros: Share of gate factors that were.
    """

    penalty: float
    zeros: float
    gate_zeros: float


def stage_weight(stages: Sequence[PenaltyStageSection], budget_share: float) -> float:
    """The penalty's weight at a point of the run.

    Constant in the first stage; in every later one it rises from the weight of the stage before to its own as
    (sin(-pi/2 + pi x) + 1) / 2 rises from 0 to 1.
    """
    start, before = 0.0, stages[0].weight
    for stage in stages:
        if budget_share < stage.until_budget_share:
            x = (budget_share - start) / (stage.until_budget_share - start)
            return before + (stage.weight - before) * (math.sin(math.pi * (x - 0.5)) + 1) / 2
        start, before = stage.until_budget_share, stage.weight
    return before


class PenaltyMeter(ForwardMeter):
    """Takes the penalty of a model's forward passes while it is on."""

    def __init__(self, model: SparseModel, gate_share: float, device: torch.device) -> None:
        super().__init__(model)
        self._gate_share = gate_share
        blocks = len(model.ffn_blocks())
        self._sums: list[list[torch.Tensor]] = [[] for _ in range(blocks)]
        self._values = [0] * blocks
        # Penalty and passes; values, zero products and zero gate factors.
        self._totals = torch.zeros(5, dtype=torch.float64, device=device)

    def _watch(self) -> Iterator[RemovableHandle]:
        for index, block in enumerate(self._model.ffn_blocks()):
            yield block.ffn_activation.register_forward_hook(partial(self._take_layer, index))

    def penalty(self) -> torch.Tensor:
        """The penalty of the forward pass that has just ended, with its gradient. []"""
        layers = [
            torch.stack(sums).sum() / max(values, 1)
            for sums, values in zip(self._sums, self._values, strict=True)
            if sums
        ]
        penalty = torch.stack(layers).sum()
        with torch.no_grad():
            self._totals[0] += penalty
            self._totals[1] += 1
        return penalty

    def reduce(self) -> PenaltyRecord:
        dist.all_reduce(self._totals)
        penalty, passes, values, zeros, gate_zeros = self._totals.tolist()
        values = max(values, 1)
        return PenaltyRecord(penalty / max(passes, 1), zeros / values, gate_zeros / values)

    def _begin(self) -> None:
        self._sums, self._values = [[] for _ in self._sums], [0] * len(self._values)

    def _take_layer(
        self,
        layer: int,
        activation: FfnActivation,
        pre_activations: tuple[torch.Tensor, torch.Tensor],
        product: torch.Tensor,
    ) -> None:
        gate_share = self._gate_share
        total = (1 - gate_share) * product.abs().sum(dtype=torch.float32)
        gate_factor = None
        if gate_share:
            gate_factor = activation.masked_gate(pre_activations[0], self._experts_of(layer))
            total = total + gate_share * gate_factor.abs().sum(dtype=torch.float32)
        if not self._in_forward:
            return
        self._sums[layer].append(total)
        self._values[layer] += product.numel()
        with torch.no_grad():
            if gate_factor is None:
                gate_factor = activation.masked_gate(pre_activations[0], self._experts_of(layer))
            self._totals[2] += product.numel()
            self._totals[3] += (product == 0).sum()
            self._totals[4] += (gate_factor == 0).sum()

    def _experts_of(self, layer: int) -> int | torch.Tensor | None:
        """The expert of each row of the call that runs; None in a dense block and without masks."""
        return getattr(self._model.ffn_blocks()[layer], "_row_experts", None)


FIRST_LOSS_SHARE = 0.003
"""Under a target the penalty begins at this share of the loss, and stays below the loss as it was then."""


@objective
class Penalty(Objective):
    """The penalty of a run; its state is that of the controller, empty where there is no target or it has not begun."""

    name: ClassVar[str] = "penalty"

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._settings = run, run.recipe.penalty
        self._budget_tokens = run.recipe.num_steps * run.recipe.step_tokens
        self._controller: Controller | None = None
        self._weight = 0.0
        self._meter = self._new_meter()

    @classmethod
    def of(cls, run: TrainingRun) -> Self | None:
        settings = run.recipe.penalty
        is_on = settings.stages or settings.target_zeros is not None
        return cls(run) if is_on else None

    @contextmanager
    def step(self) -> Iterator[None]:
        self._weight = self._next_weight()
        self._meter = self._new_meter()
        with self._meter:
            yield

    def loss(self, batch: MicroBatch, output: Any) -> torch.Tensor:
        return self._weight * self._meter.penalty() / batch.per_step

    def after_step(self, loss: float) -> dict[str, Any]:
        """`zeros` and `gate_zeros` of the step; `added` in nats, as it was added to the loss."""
        record = self._meter.reduce()
        # What a mixture with the dense activation computes is hardly ever zero.
        if self._settings.target_zeros is not None and not is_blended(self._run.engine.module):
            self._controller = self._next_controller(record, loss)
        line = {"zeros": record.zeros, "gate_zeros": record.gate_zeros, "weight": self._weight}
        return {self.name: line | {"added": self._weight * record.penalty}}

    def state(self) -> dict[str, Any]:
        return {} if self._controller is None else self._controller.saved()

    def load_state(self, state: dict[str, Any]) -> None:
        self._controller = Controller(**state) if state else None

    def _new_meter(self) -> PenaltyMeter:
        engine = self._run.engine
        return PenaltyMeter(engine.module, self._settings.gate_share, engine.device)

    def _budget_share(self) -> float:
        return self._run.state.seen_tokens / self._budget_tokens

    def _next_weight(self) -> float:
        if self._settings.stages:
            return stage_weight(self._settings.stages, self._budget_share())
        target = self._settings.target_zeros
        if target is None or self._controller is None:
            return 0.0
        return self._controller.weight(1 - target, self._budget_share())

    def _next_controller(self, record: PenaltyRecord, loss: float) -> Controller:
        target, share, fires = self._settings.target_zeros, self._budget_share(), 1 - record.zeros
        assert target is not None
        if self._controller is None:
            first_weight = FIRST_LOSS_SHARE * loss / max(record.penalty, 1e-12)
            return Controller(first_weight, 1 / FIRST_LOSS_SHARE, fires, fires, begun_at=share)
        step_share = self._run.recipe.step_tokens / self._budget_tokens
        return self._controller.after_step(1 - target, fires, share, step_share)
