"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist

from sparsify.methods.blending import blend, plain
from sparsify.methods.calibrated_checkpoint import read_record
from sparsify.methods.live_model import evaluating
from sparsify.methods.penalty import next_control, penalty_weight
from sparsify.mixture.sequences.reader import NO_LOSS, Batch
from sparsify.recipe.recipe import Recipe
from sparsify.runs.data import wait_for_sequences
from sparsify.runs.state import TrainingState, crosses, latest_checkpoint
from sparsify.training import checkpoints
from sparsify.training.checkpoints import Keep
from sparsify.training.engine import learning_rate, set_learning_rate
from sparsify.training.kernels.activation import fuse_activation
from sparsify.training.objective import Objective, pressure_line
from sparsify.training.refits import refit_if_due
from sparsify.training.router import RouterMeter, underused_steps
from sparsify.training.session import Session
from sparsify.training.stability import (
    BadStep,
    SpikeRule,
    find_bad,
    finish_step,
    judgement,
    not_recovering,
    num_bad,
    remember,
    spike_rule,
    stopped_at,
    with_range,
)
from sparsify.training.suite_results import suite_is_due
from sparsify.training.validation import continue_prompts, validate

REFERENCE_TOKENS = 32


def train(session: Session) -> bool:
    """Trains to the end of the budget.

    Returns:
        Whether the run is finished; False when it was asked to stop, after its state was saved.
    """
    recipe = session.recipe
    if session.state.step == 0:
        _validate_start(session)
    asked = _ask_suite(session)  # where an interruption cut it short
    stopping = not asked
    while session.state.step < recipe.num_steps and not stopping:
        step = session.state.step
        stopping = not refit_if_due(session) or _train_step(session)
        last = session.state.step == recipe.num_steps
        due = _due(recipe, session.state, recipe.eval.every_tokens)
        # Stopped before a step could be trained, what would be measured has been.
        if session.state.step > step and (last or due):
            _validate(session, "training")
        if last or stopping or _due(recipe, session.state, recipe.checkpoint.every_tokens):
            _save(session)
            if not stopping:
                _sample(session)
                asked = _ask_suite(session)
                stopping = not asked
    return session.state.step == recipe.num_steps and asked


def _due(recipe: Recipe, state: TrainingState, every_tokens: int) -> bool:
    """Whether the step that has just ended crossed a multiple of `every_tokens`."""
    return crosses(every_tokens, state.seen_tokens, recipe.step_tokens)


def _train_step(session: Session) -> bool:
    """One optimiser step over a global batch. Returns whether any rank was asked to stop."""
    recipe, engine, state = session.recipe, session.engine, session.state
    started = time.monotonic()
    first_sequence = state.step * recipe.training.global_batch_size
    has_data = wait_for_sequences(
        session.reader, first_sequence, recipe.training.global_batch_size, session.stop_requested
    )
    batches = _micro_batches(session) if has_data else []
    data_seconds = time.monotonic() - started
    num_labels, stopping, lacking = _agree(session, batches, has_data)
    if lacking:
        return True

    seen_tokens = state.seen_tokens + recipe.step_tokens
    rate = learning_rate(recipe.optimizer, seen_tokens, recipe.num_steps * recipe.step_tokens)
    set_learning_rate(engine, rate)
    sources = [
        name
        for name, _ in session.reader.schedule.sequences_of(
            first_sequence, recipe.training.global_batch_size
        )
    ]
    by_source = dict(zip(session.reader.names, num_labels.tolist(), strict=True))
    rule = spike_rule(recipe.stability, state.recent_losses, by_source)
    blended = blend(engine.module, recipe, state.seen_tokens, state.refits)
    weight = penalty_weight(recipe, state.control, state.seen_tokens)
    with Objective(recipe, engine, weight, session.teacher) as objective:
        sequence_losses = accumulate(
            session, batches, sources, int(num_labels.sum()), rule, objective
        )
        norm, applied = finish_step(engine)

    losses = sequence_losses.tolist()
    if not applied:
        bad = find_bad(state.step + 1, losses, sources, first_sequence, rule)
        _leave_out(session, bad, seen_tokens)
        return stopping
    sums = dict.fromkeys(session.reader.names, 0.0)
    for source, loss in zip(sources, losses, strict=True):
        sums[source] += loss
    means = {name: sums[name] / count for name, count in by_source.items() if count}
    pressure, distilled = objective.pressure(), objective.distillation()
    loss = sum(losses) / max(int(num_labels.sum()), 1)
    session.state = replace(
        state,
        step=state.step + 1,
        seen_tokens=seen_tokens,
        recent_losses=remember(recipe.stability, state, means),
        control=next_control(recipe, state.control, seen_tokens, pressure, loss, blended),
    )
    session.telemetry.train(
        session.state.step,
        seen_tokens,
        sums,
        by_source,
        learning_rate=rate,
        gradient_norm=norm,
        **session.performance.step(recipe.step_tokens, time.monotonic() - started, data_seconds),
        **({} if blended == 1 else {"blended_share": blended}),
        **({} if pressure is None else {"pressure": pressure_line(pressure, weight or 0.0)}),
        **({} if distilled is None else {"distillation": distilled}),
        **_watch_routers(session, objective.routers),
        **({} if objective.zeros is None else {"zeros": objective.zeros.share()}),
    )
    return stopping


def _watch_routers(session: Session, routers: RouterMeter | None) -> dict[str, Any]:
    """Raises the alarm for experts that starve. Returns what the step's line says of the routers."""
    if routers is None:
        return {}
    state, record = session.state, routers.reduce()
    counts, alarms = underused_steps(session.recipe.stability, state.underused_steps, record.load)
    session.state = replace(state, underused_steps=counts)
    steps = session.recipe.stability.underused_expert_steps
    for layer, expert in alarms:
        load = record.load[layer][expert]
        session.telemetry.record(
            "underused_expert",
            state.step,
            state.seen_tokens,
            f"expert {expert} of layer {layer} is under-utilised at step {state.step:,}: {load:.2%} of its "
            f"layer's tokens, too few for {steps} steps in a row; a higher "
            "training.router_aux_loss_coefficient spreads them more evenly",
            steps=steps,
            layer=layer,
            expert=expert,
            load=load,
        )
    return {"router": asdict(record)}


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
    """This rank's sequences of the next global batch; the batch itself does not depend on the number of ranks."""
    training = session.recipe.training
    first = session.state.step * training.global_batch_size
    rank, world, size = dist.get_rank(), dist.get_world_size(), training.micro_batch_size
    return [
        session.reader.batch(first + (index * world + rank) * size, size)
        for index in range(session.recipe.accumulation_steps)
    ]


def accumulate(
    session: Session,
    batches: list[Batch],
    sources: list[str],
    num_labels: int,
    rule: SpikeRule | None,
    objective: Objective,
) -> torch.Tensor:
    """Forward and backward of the global batch, up to the last micro-batch's step.

    Returns:
        Summed cross-entropy of each of its sequences, the same on every rank. [batch sequences]
    """
    engine, size = session.engine, session.recipe.training.micro_batch_size
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = torch.zeros(len(sources), dtype=torch.float64, device=engine.device)
    for index, batch in enumerate(batches):
        loss, by_sequence = objective.forward(batch, num_labels)
        place = (index * world + rank) * size
        losses[place : place + size] = by_sequence.detach()
        last = index == len(batches) - 1
        if last:
            dist.all_reduce(losses)
            loss = loss * judgement(losses, sources, rule)
        engine.backward(loss, scale_wrt_gas=False)
        if not last:
            engine.step()  # counts the micro-batch
    return losses


def _leave_out(session: Session, bad: BadStep, seen_tokens: int) -> None:
    """Goes on after a bad step as `stability.on_bad_step` says; the weights are still those from before it.

    Raises:
        RunError: If that is to stop, or if there were too many bad steps of late.
    """
    settings, state = session.recipe.stability, session.state
    session.telemetry.record(
        "bad_step",
        bad.step,
        seen_tokens,
        f"{bad.sentence()}; on_bad_step={settings.on_bad_step}",
        **{key: value for key, value in asdict(bad).items() if key != "step"},
        policy=settings.on_bad_step,
    )
    if settings.on_bad_step == "stop":
        if state.step:
            _save(session)
        raise stopped_at(bad, f"The state from before it, step {state.step:,}, is saved.")
    before, (first, last) = state, bad.sequences
    newest = None
    if settings.on_bad_step == "rollback":
        newest = latest_checkpoint(session.run.checkpoints)
    if newest is not None:
        before = checkpoints.load(session.engine, newest)
        first = before.step * session.recipe.training.global_batch_size
    session.state = replace(
        before,
        step=bad.step,
        seen_tokens=seen_tokens,
        recent_losses=remember(settings, before, None),
        left_out_sequences=with_range(before.left_out_sequences, first, last),
    )
    if num_bad(session.state) > settings.max_bad_steps:
        raise not_recovering(settings, session.state, bad)
    if newest is not None:
        session.telemetry.record(
            "rollback",
            bad.step,
            seen_tokens,
            f"rolled back to the weights of step {before.step:,}; sequences {first}–{last} are skipped",
            to_step=before.step,
            sequences=(first, last),
        )
        _save(session)  # so that a resume finds the same sequences left out


def _validate_start(session: Session) -> None:
    """Before any training: the base with its own activation, then what the activation replacement alone made of it."""
    model, activation = session.engine.module, session.recipe.activation.ffn_activation
    base = model.config.base_ffn_activation
    calibration = read_record(session.run.initial)
    if calibration is not None:
        # The weights are no longer the base's, which was measured on the same sequences while it was calibrated.
        _record_base(session, calibration["stages"][0])
        _validate(session, "after_replacement")
    elif session.recipe.model.init == "pretrained" and activation != base:
        model.set_ffn_activation(base, model.config.base_ffn_gate_threshold)
        _validate(session, "base")
        model.set_ffn_activation(activation, session.recipe.activation.model_gate_threshold)
        fuse_activation(model, session.recipe)
        _validate(session, "after_replacement")
    else:
        _validate(session, "base")


def _record_base(session: Session, stage: Mapping[str, Any]) -> None:
    """Records the validation losses of the dense base that a calibration measured: `losses` by source, and `zeros`."""
    losses: dict[str, float] = stage["losses"]
    weights = {source: session.shares.get(source, 0.0) for source in losses}
    loss = sum(weights[name] * value for name, value in losses.items()) / sum(weights.values())
    session.telemetry.record(
        "validation",
        0,
        0,
        f"validation base: loss {loss:.3f}, measured during calibration",
        label="base",
        loss=loss,
        sources=losses,
        zeros=stage["zeros"],
        source_zeros={},
    )


def _validate(session: Session, label: str) -> None:
    fields = {}
    if label == "training":
        state = session.state
        share = blend(session.engine.module, session.recipe, state.seen_tokens, state.refits)
        if share < 1:
            label, fields = "blending", {"blended_share": share}
    result = validate(
        session.engine,
        session.held_out,
        session.shares,
        session.recipe.training.micro_batch_size,
    )
    state = session.state
    session.telemetry.validation(state.step, state.seen_tokens, result, label, **fields)


def _save(session: Session) -> None:
    if session.saved is session.state:  # stopped before a step could be trained
        return
    started = time.monotonic()
    recipe = session.recipe
    reference = _reference(session)
    # Counted only here: for shares without a short period it takes a moment, which no step should wait for.
    drawn = session.reader.schedule.counts(session.state.step * recipe.training.global_batch_size)
    session.state = replace(
        session.state,
        drawn_sequences=drawn,
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
    seconds = time.monotonic() - started
    session.telemetry.record(
        "checkpoint",
        session.state.step,
        session.state.seen_tokens,
        f"saved {saved.path} ({saved.size_bytes / 1e6:.0f} MB, {seconds:.1f} s)",
        bytes=saved.size_bytes,
        seconds=round(seconds, 3),
    )


def _sample(session: Session) -> None:
    state, settings = session.state, session.recipe.eval
    if settings.sample_prompts:
        texts = continue_prompts(session.engine, session.tokenizer, settings)
        session.telemetry.samples(state.step, state.seen_tokens, settings.sample_prompts, texts)


def _ask_suite(session: Session) -> bool:
    """Returns False when a rank was asked to stop before the suite was done; the checkpoint is saved all the same."""
    if session.suite is None or not suite_is_due(session.recipe, session.state):
        return True
    return session.suite.measure(
        session.engine, session.state, session.telemetry, session.stop_requested
    )


@torch.no_grad()
def _reference(session: Session) -> dict[str, torch.Tensor]:
    """What the live weights answer to the first held-out sequence, with the activation that they will be loaded with.

    Every rank computes it, which ZeRO-3 needs.
    """
    sequence = next(iter(session.held_out.values()))[0]
    input_ids = torch.from_numpy(sequence.input_ids[:REFERENCE_TOKENS].copy())[None].to(
        session.engine.device
    )
    with evaluating(session.engine), plain(session.engine.module):
        logits = session.engine(input_ids=input_ids, use_cache=False).logits
    return {"input_ids": input_ids.cpu(), "logits": logits.float().cpu()}
