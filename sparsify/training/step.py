"""The data of one step, and its forward and backward passes."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sparsify.methods.objective import MicroBatch
from sparsify.mixture.sequences.reader import NO_LOSS, Batch
from sparsify.runs.data import wait_for_sequences
from sparsify.training.kernels.liger import LossHead
from sparsify.training.session import Session
from sparsify.training.spikes import SpikeRule
from sparsify.training.stability import nan_if_bad
from sparsify.training.validation import sequence_losses


@dataclass(frozen=True)
class GlobalBatch:
    """What one step trains on. The batch itself does not depend on the number of ranks.

    Attributes:
        first_sequence: Global number of the first sequence.
        sources: Source of each sequence.
        num_labels: Labels of each source over all ranks.
        micro_batches: This rank's share.
    """

    first_sequence: int
    sources: list[str]
    num_labels: dict[str, int]
    micro_batches: list[Batch]


def next_batch(session: Session) -> tuple[GlobalBatch | None, bool]:
    """Waits for the data of the next step; every rank calls it.

    Returns:
        The batch, None where any rank has to stop before its data is there; and whether any rank has to stop.
    """
    reader, training = session.reader, session.recipe.training
    first, size = session.state.step * training.global_batch_size, training.micro_batch_size
    has_data = wait_for_sequences(reader, first, training.global_batch_size, session.stop_requested)
    rank, world = dist.get_rank(), dist.get_world_size()
    micro_batches = []
    if has_data:
        micro_batches = [
            reader.batch(first + (index * world + rank) * size, size)
            for index in range(session.recipe.accumulation_steps)
        ]
    # One reduction for all that the ranks agree on: labels of each source, any stop, any lack of data.
    counts = torch.zeros(len(reader.names) + 2, dtype=torch.int64)
    for batch in micro_batches:
        labels = (batch.tensors["labels"] != NO_LOSS).sum(1)
        counts.index_add_(0, batch.sources, labels)
    counts[-2], counts[-1] = session.stop_requested(), not has_data
    counts = counts.to(session.engine.device)
    dist.all_reduce(counts)
    *num_labels, stopping, lacking = counts.tolist()
    if lacking:
        return None, True
    drawn = reader.schedule.sequences_of(first, training.global_batch_size)
    by_source = dict(zip(reader.names, num_labels, strict=True))
    batch = GlobalBatch(first, [name for name, _ in drawn], by_source, micro_batches)
    return batch, bool(stopping)


def accumulate(
    session: Session,
    batches: list[Batch],
    sources: list[str],
    num_labels: int,
    rule: SpikeRule | None,
) -> torch.Tensor:
    """Forward and backward of the global batch with the run's objectives, up to the last micro-batch's step.

    Args:
        session: The rank's.
        batches: Its micro-batches.
        sources: Source of each sequence of the global batch.
        num_labels: Labels of the global batch.
        rule: What the loss may be; None where that is not known.

    Returns:
        Summed cross-entropy of each of the global batch's sequences, the same on every rank. [sequences]
    """
    engine, size = session.engine, session.recipe.training.micro_batch_size
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = torch.zeros(len(sources), dtype=torch.float64, device=engine.device)
    with ExitStack() as stack:
        for objective in session.objectives:
            stack.enter_context(objective.step())
        for index, batch in enumerate(batches):
            loss, by_sequence = _forward(session, batch, num_labels)
            place = (index * world + rank) * size
            losses[place : place + size] = by_sequence.detach()
            last = index == len(batches) - 1
            if last:
                dist.all_reduce(losses)
                loss = loss * nan_if_bad(losses, sources, rule)
            engine.backward(loss, scale_wrt_gas=False)
            if not last:
                engine.step()  # counts the micro-batch
    return losses


def _forward(session: Session, batch: Batch, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of one micro-batch, and the summed cross-entropy of each of its sequences. [] and [sequences]"""
    engine, objectives = session.engine, session.objectives
    micro_batch = MicroBatch(
        {key: value.to(engine.device) for key, value in batch.tensors.items()},
        dist.get_world_size() / max(num_labels, 1),
        session.recipe.accumulation_steps,
    )
    options: dict[str, Any] = {}
    for objective in objectives:
        objective.before_forward(micro_batch)
        options |= objective.forward_options
    output, total, by_sequence = _cross_entropy(session, micro_batch.tensors, options)
    loss = total * micro_batch.label_weight
    for objective in objectives:
        added = objective.loss(micro_batch, output)
        if added is not None:
            loss = loss + added
    return loss, by_sequence


def _cross_entropy(
    session: Session, tensors: dict[str, torch.Tensor], options: dict[str, Any]
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model's output; the cross-entropy summed over the labels, which has a gradient; and each sequence's. [] and [sequences]"""
    head = session.engine.module.lm_head
    fused = isinstance(head, LossHead)
    with head.loss_of(tensors["labels"]) if fused else nullcontext():
        output = session.engine(
            input_ids=tensors["input_ids"],
            position_ids=tensors["position_ids"],
            use_cache=False,
            **options,
        )
    if fused:
        return output, *output.logits
    by_sequence = sequence_losses(output.logits, tensors["labels"])
    return output, by_sequence.sum(), by_sequence
