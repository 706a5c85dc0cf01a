"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from sparsify.mixture.windows import Window, WindowReader, collate
from sparsify.recipe import Recipe
from sparsify.training import checkpoints
from sparsify.training.checkpoints import TrainingState
from sparsify.training.engine import set_learning_rate
from sparsify.training.run_folder import RunFolder
from sparsify.training.schedule import learning_rate
from sparsify.training.telemetry import Telemetry
from sparsify.training.validation import IGNORED_LABEL, summed_loss, validate

REFERENCE_TOKENS = 32


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
    return (
        state.seen_tokens // every_tokens > (state.seen_tokens - recipe.step_tokens) // every_tokens
    )


def _train_step(session: Session) -> bool:
    """One optimiser step over a global batch. Returns whether any rank was asked to stop."""
    recipe, engine, state = session.recipe, session.engine, session.state
    batches = _micro_batches(session)
    counts = torch.tensor(
        [
            sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in batches),
            session.stop_requested(),
        ]
    ).to(engine.device)
    dist.all_reduce(counts)
    num_labels, stopping = int(counts[0]), bool(counts[1])

    seen_tokens = state.seen_tokens + recipe.step_tokens
    rate = learning_rate(recipe.optimizer, seen_tokens, recipe.num_steps * recipe.step_tokens)
    set_learning_rate(engine, rate)
    loss_sum = torch.zeros((), dtype=torch.float64, device=engine.device)
    for batch in batches:
        loss_sum += _accumulate(session, batch, num_labels)
        engine.step()
    dist.all_reduce(loss_sum)

    session.state = replace(state, step=state.step + 1, seen_tokens=seen_tokens)
    norm = engine.get_global_grad_norm()  # None at ZeRO stage 0 in fp32
    session.telemetry.train(
        session.state.step,
        seen_tokens,
        float(loss_sum) / max(num_labels, 1),
        learning_rate=rate,
        gradient_norm=None if norm is None else float(norm),
    )
    return stopping


def _micro_batches(session: Session) -> list[dict[str, torch.Tensor]]:
    """This rank's windows of the next global batch; the batch itself does not depend on the number of ranks."""
    training = session.recipe.training
    first = session.state.step * training.batch_windows
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = []
    for index in range(session.recipe.accumulation_steps):
        start = first + (index * world + rank) * training.micro_batch_windows
        windows = [session.reader.window(start + i) for i in range(training.micro_batch_windows)]
        batches.append(
            {key: value.to(session.engine.device) for key, value in collate(windows).items()}
        )
    return batches


def _accumulate(session: Session, batch: dict[str, torch.Tensor], num_labels: int) -> torch.Tensor:
    """Forward and backward of one micro-batch. Every label of the global batch weighs the same.

    DeepSpeed averages gradients over ranks, so the sum over this rank's labels is scaled by ranks / labels.

    Returns:
        The micro-batch's summed cross-entropy, without gradient.
    """
    engine = session.engine
    routed = hasattr(engine.module.config, "num_local_experts")
    options = {"output_router_logits": True} if routed else {}
    output = engine(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False, **options
    )
    cross_entropy = summed_loss(output.logits, batch["labels"])
    loss = cross_entropy * dist.get_world_size() / max(num_labels, 1)
    if routed:
        coefficient = engine.module.config.router_aux_loss_coef
        loss = loss + coefficient * output.aux_loss / session.recipe.accumulation_steps
    engine.backward(loss, scale_wrt_gas=False)
    return cross_entropy.detach().double()


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
    started = time.monotonic()
    reference = _reference(session)
    path = checkpoints.save(
        session.engine,
        session.state,
        session.run.checkpoints,
        session.recipe.checkpoint.keep_last,
        reference,
    )
    session.telemetry.saved(path, time.monotonic() - started)


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
