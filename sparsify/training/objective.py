"""What one step minimises: the cross-entropy, and beside it the routers' balance, the activations' penalty and distillation."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from typing import Any, Self

import torch
import torch.distributed as dist

from sparsify.methods.distillation import Distiller, Teacher
from sparsify.methods.live_model import Engine
from sparsify.methods.penalty import PressureMeter, PressureRecord
from sparsify.mixture.sequences.reader import Batch
from sparsify.recipe.recipe import Recipe
from sparsify.training.kernels.activation import ZeroMeter, zero_meter
from sparsify.training.kernels.liger import LossHead
from sparsify.training.router import RouterMeter, aux_loss_coefficient, router_meter
from sparsify.training.validation import sequence_losses


class Objective:
    """Context manager around the forward and backward passes of one step.

    Args:
        recipe: The run's recipe.
        engine: Its engine.
        penalty_weight: Weight of the activations' penalty in this step; None where the recipe has no penalty.
        teacher: The dense source; None where the recipe distils nothing.
    """

    def __init__(
        self,
        recipe: Recipe,
        engine: Engine,
        penalty_weight: float | None,
        teacher: Teacher | None,
    ) -> None:
        self._recipe, self._engine = recipe, engine
        self._penalty_weight = penalty_weight or 0.0
        self.routers: RouterMeter | None = router_meter(engine)
        self.zeros: ZeroMeter | None = zero_meter(recipe, engine)
        self._pressure: PressureMeter | None = None
        if penalty_weight is not None:
            gate_share = recipe.penalty.gate_share
            self._pressure = PressureMeter(engine.module, gate_share, engine.device)
        self._distiller: Distiller | None = None
        if teacher is not None:
            self._distiller = Distiller(recipe.distillation, teacher, engine.module, engine.device)
        self._hooks = ExitStack()

    def __enter__(self) -> Self:
        if self._pressure is not None:
            self._hooks.enter_context(self._pressure)
        if self._distiller is not None:
            self._hooks.enter_context(self._distiller)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def forward(self, batch: Batch, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss of one micro-batch, and the summed cross-entropy of each of its sequences. [] and [sequences]

        Every label of the global batch weighs the same: DeepSpeed averages gradients over ranks, so the sum over this rank's
        labels is scaled by ranks / labels. What is a mean over a micro-batch's tokens is divided by the micro-batches.

        Args:
            batch: The micro-batch.
            num_labels: Labels of the global batch.
        """
        engine, recipe = self._engine, self._recipe
        options = {} if self.routers is None else {"output_router_logits": True}
        tensors = {key: value.to(engine.device) for key, value in batch.tensors.items()}
        if self._distiller is not None:
            self._distiller.ask(tensors)
        output, total, by_sequence = _forward(engine, tensors, **options)
        each_label = dist.get_world_size() / max(num_labels, 1)
        loss = total * each_label
        if self._distiller is not None:
            loss = loss + self._distiller.loss(output.logits) * each_label
        if self.routers is not None:
            self.routers.add(output.router_logits, output.aux_loss)
            coefficient = aux_loss_coefficient(recipe, engine.module.config)
            loss = loss + coefficient * output.aux_loss / recipe.accumulation_steps
        if self._pressure is not None:
            penalty = self._pressure.penalty()
            loss = loss + self._penalty_weight * penalty / recipe.accumulation_steps
        return loss, by_sequence

    def pressure(self) -> PressureRecord | None:
        """What the penalty met in this step, over all ranks; every rank calls it."""
        return None if self._pressure is None else self._pressure.reduce()

    def distillation(self) -> dict[str, float] | None:
        """How far the model was from its teacher in this step, over all ranks; every rank calls it."""
        return None if self._distiller is None else self._distiller.reduce()


def _forward(
    engine: Engine, tensors: dict[str, torch.Tensor], **options: Any
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model's output; the cross-entropy summed over the labels, which has a gradient; and each sequence's. [] and [sequences]"""
    head = engine.module.lm_head
    fused = isinstance(head, LossHead)
    with head.judged_by(tensors["labels"]) if fused else nullcontext():
        output = engine(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            use_cache=False,
            **options,
        )
    if fused:
        return output, *output.logits
    by_sequence = sequence_losses(output.logits, tensors["labels"])
    return output, by_sequence.sum(), by_sequence


def pressure_line(record: PressureRecord, weight: float) -> dict[str, float]:
    """What a step's line says of the penalty; `penalty` in nats, as it was added to the loss."""
    return asdict(record) | {"weight": weight, "penalty": weight * record.penalty}
