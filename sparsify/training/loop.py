"""The training loop. Methods join it as objectives (`sparsify.methods.objective`); it knows none by name."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any

from sparsify.runs.state import crosses
from sparsify.training.checkpoints import save_session
from sparsify.training.deepspeed_engine import learning_rate, set_learning_rate
from sparsify.training.session import Session
from sparsify.training.spikes import spike_rule
from sparsify.training.stability import find_bad, finish_step, limited_sum, remember, skip_step
from sparsify.training.step import accumulate, next_batch
from sparsify.training.validation import evaluate_suite, sample, validate_session, validate_start


def train(session: Session) -> bool:
    """Trains to the end of the budget.

    Returns:
        Whether the run is finished; False when it had to stop, after its state was saved.
    """
    recipe = session.recipe
    if session.state.step == 0:
        validate_start(session)
    suite_done = evaluate_suite(session)  # where an interruption cut it short
    stopping = not suite_done
    while session.state.step < recipe.num_steps and not stopping:
        step = session.state.step
        ready = all(objective.between_steps() for objective in session.objectives)
        stopping = not ready or _train_step(session)
        last = session.state.step == recipe.num_steps
        # Stopped before a step could be trained, what would be measured has been.
        if session.state.step > step and (last or _is_due(session, recipe.eval.every_tokens)):
            validate_session(session)
        if last or stopping or _is_due(session, recipe.checkpoint.every_tokens):
            save_session(session)
            if not stopping:
                sample(session)
                suite_done = evaluate_suite(session)
                stopping = not suite_done
    return session.state.step == recipe.num_steps and suite_done


def _is_due(session: Session, every_tokens: int) -> bool:
    return crosses(every_tokens, session.state.seen_tokens, session.recipe.step_tokens)


def _train_step(session: Session) -> bool:
    recipe, engine, state = session.recipe, session.engine, session.state
    started = time.monotonic()
    batch, stopping = next_batch(session)
    if batch is None:
        return True
    data_seconds = time.monotonic() - started

    seen_tokens = state.seen_tokens + recipe.step_tokens
    rate = learning_rate(recipe.optimizer, seen_tokens, recipe.num_steps * recipe.step_tokens)
    set_learning_rate(engine, rate)
    num_labels, sources = sum(batch.num_labels.values()), batch.sources
    num_sequences = Counter(sources)
    rule = spike_rule(recipe.stability, state.recent_losses, state.recent_rises, batch.num_labels, num_sequences)
    losses = accumulate(session, batch.micro_batches, sources, num_labels, rule).tolist()
    norm, applied = finish_step(engine)
    if not applied:
        bad = find_bad(state.step + 1, losses, sources, batch.first_sequence, rule)
        skip_step(session, bad, seen_tokens)
        return stopping

    sums = dict.fromkeys(batch.num_labels, 0.0)
    for source, loss in zip(sources, losses, strict=True):
        sums[source] += loss
    means = {name: sums[name] / count for name, count in batch.num_labels.items() if count}
    rise = 0.0 if rule is None else limited_sum(losses, sources, rule) / rule.num_labels - rule.expected
    session.state = replace(
        state,
        step=state.step + 1,
        seen_tokens=seen_tokens,
        recent_losses=remember(recipe.stability, state.recent_losses, means),
        recent_rises=remember(recipe.stability, state.recent_rises, rise),
    )
    fields: dict[str, Any] = {}
    for objective in session.objectives:
        fields |= objective.after_step(sum(losses) / max(num_labels, 1))
    session.update_methods()
    seconds = time.monotonic() - started
    session.telemetry.train(
        session.state.step,
        seen_tokens,
        sums,
        batch.num_labels,
        learning_rate=rate,
        gradient_norm=norm,
        **session.performance.step(recipe.step_tokens, seconds, data_seconds),
        **fields,
    )
    return stopping
