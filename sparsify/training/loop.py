"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from sparsify.mixture.windows import NO_LOSS, Batch, Window, WindowReader
from sparsify.recipe import Recipe
from sparsify.training import checkpoints
from sparsify.training.checkpoints import Keep, TrainingState
from sparsify.training.engine import set_learning_rate
from sparsify.training.run_folder import RunFolder
from sparsify.training.schedule import learning_rate
from sparsify.training.telemetry import Telemetry
from sparsify.training.validation import validate, window_losses

REFERENCE_TOKENS = 32
DATA_POLL_SECONDS = 0.1


@dataclass
class Session:
    """One rank's share of a run: the engine, its data and its counters."""

    recipe: Recipe
    run: RunFolder
    engine: Any
    reader: WindowReader
    held_out: Mapping[str, Sequence[Window]]
    shares: Mapping[str, float]
    telemetry: Telemetry
    state: TrainingState
    stop_requested: Callable[[], bool]
    saved: TrainingState | None = None
    """The state that the newest checkpoint holds, or None before the first."""


def train(session: Session) -> bool:
    """Trains to the end of the budget.

    Returns:
        Whether the run is finished; False when it was asked to stop, after its state was saved.
    """
    recipe = session.recipe
    if session.state.step == 0:
        _validate_start(session)
    stopping = False
    while session.state.step < recipe.num_steps and not stopping:
        stopping = _train_step(session)
        last = session.state.step == recipe.num_steps
        if last or _due(recipe, session.state, recipe.eval.every_tokens):
            _validate(session, "training")
        if last or stopping or _due(recipe, session.state, recipe.checkpoint.every_tokens):
            _save(session)
    return session.state.step == recipe.num_steps


def _due(recipe: Recipe, state: TrainingState, every_tokens: int) -> bool:
    """Whether the step that has just ended crossed a multiple of `every_tokens`."""
    return checkpoints.crosses(every_tokens, state.seen_tokens, recipe.step_tokens)


def _train_step(session: Session) -> bool:
    """One optimiser step over a global batch. Returns whether any rank was asked to stop."""
    recipe, engine, state = session.recipe, session.engine, session.state
    has_data = _wait_for_data(session)
    batches = _micro_batches(session) if has_data else []
    num_labels, stopping, lacking = _agree(session, batches, has_data)
    if lacking:
        return True

    seen_tokens = state.seen_tokens + recipe.step_tokens
    rate = learning_rate(recipe.optimizer, seen_tokens, recipe.num_steps * recipe.step_tokens)
    set_learning_rate(engine, rate)
    loss_sums = torch.zeros(len(num_labels), dtype=torch.float64, device=engine.device)
    for batch in batches:
        _accumulate(session, batch, loss_sums, int(num_labels.sum()))
        engine.step()
    dist.all_reduce(loss_sums)

    session.state = replace(state, step=state.step + 1, seen_tokens=seen_tokens)
    norm = engine.get_global_grad_norm()  # None at ZeRO stage 0 in fp32
    session.telemetry.train(
        session.state.step,
        seen_tokens,
        dict(zip(session.reader.names, loss_sums.tolist(), strict=True)),
        dict(zip(session.reader.names, num_labels.tolist(), strict=True)),
        learning_rate=rate,
        gradient_norm=None if norm is None else float(norm),
    )
    return stopping


def _wait_for_data(session: Session) -> bool:
    """Waits until the next global batch is tokenised. Returns False when this rank was asked to stop before it was."""
    batch_windows = session.recipe.training.batch_windows
    while not session.reader.is_here(session.state.step * batch_windows, batch_windows):
        if session.stop_requested():
            return False
        time.sleep(DATA_POLL_SECONDS)
    return True


def _agree(
    session: Session, batches: list[Batch], has_data: bool
) -> tuple[torch.Tensor, bool, bool]:
    """Over all ranks: labels of each source, whether any was asked to stop, whether any lacks its data."""
    counts = torch.zeros(len(session.reader.names) + 2, dtype=torch.int64)
    for batch in batches:
        labels = (batch.tensors["labels"] != NO_LOSS).sum(1)
        counts.index_add_(0, batch.sources, labels)
    counts[-2], counts[-1] = session.stop_requested(), not has_data
    counts = counts.to(session.engine.device)
    dist.all_reduce(counts)
    return counts[:-2], bool(counts[-2]), bool(counts[-1])


def _micro_batches(session: Session) -> list[Batch]:
    """This rank's windows of the next global batch; the batch itself does not depend on the number of ranks."""
    training = session.recipe.training
    first = session.state.step * training.batch_windows
    rank, world, size = dist.get_rank(), dist.get_world_size(), training.micro_batch_windows
    return [
        session.reader.batch(first + (index * world + rank) * size, size)
        for index in range(session.recipe.accumulation_steps)
    ]


def _accumulate(session: Session, batch: Batch, loss_sums: torch.Tensor, num_labels: int) -> None:
    """Forward and backward of one micro-batch. Every label of the global batch weighs the same.

    DeepSpeed averages gradients over ranks, so the sum over this rank's labels is scaled by ranks / labels. Adds each
    source's summed cross-entropy to `loss_sums`.
    """
    engine = session.engine
    routed = hasattr(engine.module.config, "num_local_experts")
    options = {"output_router_logits": True} if routed else {}
    tensors = {key: value.to(engine.device) for key, value in batch.tensors.items()}
    output = engine(
        input_ids=tensors["input_ids"],
        position_ids=tensors["position_ids"],
        use_cache=False,
        **options,
    )
    by_window = window_losses(output.logits, tensors["labels"])
    loss = by_window.sum() * dist.get_world_size() / max(num_labels, 1)
    if routed:
        coefficient = engine.module.config.router_aux_loss_coef
        loss = loss + coefficient * output.aux_loss / session.recipe.accumulation_steps
    engine.backward(loss, scale_wrt_gas=False)
    loss_sums.index_add_(0, batch.sources.to(engine.device), by_window.detach().double())


def _validate_start(session: Session) -> None:
    """Before any training: the base with its own activation, then what the swap alone made of it."""
    model, activation = session.engine.module, session.recipe.activation.ffn_activation
    base = model.config.base_ffn_activation
    if session.recipe.model.init == "pretrained" and activation != base:
        model.set_ffn_activation(base)
        _validate(session, "base")
        model.set_ffn_activation(activation)
        _validate(session, "after_swap")
    else:
        _validate(session, "base")


def _validate(session: Session, label: str) -> None:
    result = validate(
        session.engine,
        session.held_out,
        session.shares,
        session.recipe.training.micro_batch_windows,
    )
    session.telemetry.validation(session.state.step, session.state.seen_tokens, result, label)


def _save(session: Session) -> None:
    if session.saved is session.state:  # stopped before a step could be trained
        return
    started = time.monotonic()
    recipe = session.recipe
    reference = _reference(session)
    # Counted only here: for shares without a short period it takes a moment, which no step should wait for.
    drawn = session.reader.schedule.counts(session.state.step * recipe.training.batch_windows)
    session.state = replace(
        session.state,
        drawn_windows=drawn,
        processes=dist.get_world_size(),
        zero_stage=recipe.engine.zero_stage,
    )
    saved = checkpoints.save(
        session.engine,
        session.state,
        session.run.checkpoints,
        Keep.of(recipe.checkpoint, recipe.step_tokens),
        reference,
    )
    session.saved = session.state
    session.telemetry.saved(session.state, saved, time.monotonic() - started)


@torch.no_grad()
def _reference(session: Session) -> dict[str, torch.Tensor]:
    """What the live model answers to the first held-out window; every rank computes it, which ZeRO-3 needs."""
    window = next(iter(session.held_out.values()))[0]
    input_ids = torch.from_numpy(window.input_ids[:REFERENCE_TOKENS].copy())[None].to(
        session.engine.device
    )
    session.engine.eval()
    logits = session.engine(input_ids=input_ids, use_cache=False).logits
    session.engine.train()
    return {"input_ids": input_ids.cpu(), "logits": logits.float().cpu()}
