"""Pressure on the neurons to be exactly zero: ProSparse's progressive L1 penalty, and what it meets in each step.

The penalty is the mean of |activation| over tokens and neurons, summed over layers (arXiv 2402.13516, section 3.2), with a part of
it on the gate's factor alone where the recipe says so. In a mixture of experts the mean is over the tokens that were routed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
import torch.distributed as dist
from torch import nn

from sparsify.models import FfnActivation, SparseModel
from sparsify.recipe_sparsity import PenaltyStageSection


@dataclass(frozen=True)
class PressureRecord:
    """What the penalty met in one step, over all ranks and layers.

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

    Args:
        stages: At least one.
        budget_share: Tokens seen as a share of the budget.
    """
    start, before = 0.0, stages[0].weight
    for stage in stages:
        if budget_share < stage.until_budget_share:
            x = (budget_share - start) / (stage.until_budget_share - start)
            return before + (stage.weight - before) * (math.sin(math.pi * (x - 0.5)) + 1) / 2
        start, before = stage.until_budget_share, stage.weight
    return before


class PressureMeter:
    """Context manager that takes the penalty of a model's forward passes while it is on.

    It watches activations, never weights, so partitioned weights (ZeRO-3) do not matter to it. What activation checkpointing
    computes again during the backward pass is not counted again; there the hooks only repeat what they keep for it.

    Args:
        model: The model that trains.
        gate_share: Part of the penalty on the gate's factor, 0 to 1.
        device: Where to count.
    """

    def __init__(self, model: SparseModel, gate_share: float, device: torch.device) -> None:
        self._model, self._gate_share = model, gate_share
        self._in_forward = False
        blocks = len(model.ffn_blocks())
        self._sums: list[list[torch.Tensor]] = [[] for _ in range(blocks)]
        self._values = [0] * blocks
        # Penalty and passes; values, zero products and zero gate factors.
        self._totals = torch.zeros(5, dtype=torch.float64, device=device)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        decoder = self._model.model
        self._handles = [
            decoder.register_forward_pre_hook(self._begin),
            decoder.register_forward_hook(self._end, always_call=True),
        ]
        for index, block in enumerate(self._model.ffn_blocks()):
            hook = partial(self._take_layer, index)
            self._handles.append(block.ffn_activation.register_forward_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

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

    def reduce(self) -> PressureRecord:
        """The step's record over all ranks; every rank calls it."""
        dist.all_reduce(self._totals)
        penalty, passes, values, zeros, gate_zeros = self._totals.tolist()
        values = max(values, 1)
        return PressureRecord(penalty / max(passes, 1), zeros / values, gate_zeros / values)

    def _begin(self, decoder: nn.Module, _: object) -> None:
        self._sums, self._values = [[] for _ in self._sums], [0] * len(self._values)
        self._in_forward = True

    def _end(self, decoder: nn.Module, _: object, output: object) -> None:
        self._in_forward = False

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
            gate_factor = activation.gate_factor(pre_activations[0])
            total = total + gate_share * gate_factor.abs().sum(dtype=torch.float32)
        if not self._in_forward:
            return
        self._sums[layer].append(total)
        self._values[layer] += product.numel()
        with torch.no_grad():
            if gate_factor is None:
                gate_factor = activation.gate_factor(pre_activations[0])
            self._totals[2] += product.numel()
            self._totals[3] += (product == 0).sum()
            self._totals[4] += (gate_factor == 0).sum()
