"""Bad steps: which they are, how to leave the weights as they were, and what to say.

A step is bad when a sequence's loss or the gradient is NaN or infinite, or when its loss is a spike (`sparsify.training.spikes`). Whether
a loss is a spike is known before the last backward pass, on every rank and without waiting for the device: the loss is then multiplied by NaN, and
DeepSpeed discards the step as it discards every step whose gradient norm is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch

from sparsify.errors import RunError
from sparsify.methods.live_model import Engine
from sparsify.recipe.training import StabilitySection
from sparsify.runs.state import TrainingState, latest_checkpoint
from sparsify.training import checkpoints
from sparsify.training.session import Session
from sparsify.training.spikes import SpikeRule
from sparsify.training.validation import validate_session

WORSE_SHARE, WORSE_NATS = 0.25, 0.25
"""A model is worse than at the last validation if its held-out loss has risen by this share of it and so many nats."""
SHOWN_SEQUENCES = 8
SHOWN_RANGES = 8


@dataclass(frozen=True)
class BadStep:
    """A step that must not go into the weights.

    Attributes:
        step: Its number; the first step of a run is 1.
        reason: `loss_not_finite`, `gradient_not_finite` or `spike`.
        loss: Mean cross-entropy of the labels that have a limit, in nats; None where there is none.
        limit: What that could at most be, in nats; None where there are too few steps to tell.
        rise: How far it was above the expected loss, in nats; 0 where that is not known, None where it is not finite.
        sequences: First and last of its sequences, by their global numbers.
        suspects: Numbers of the sequences whose loss is not finite, or of those with the highest loss at a spike, by source.
    """

    step: int
    reason: str
    loss: float | None
    limit: float | None
    rise: float | None
    sequences: tuple[int, int]
    suspects: dict[str, list[int]]

    def sentence(self) -> str:
        what = {
            "loss_not_finite": "the loss is NaN or infinite",
            "gradient_not_finite": "the gradient is NaN or infinite, though the loss is not",
            "spike": f"the loss jumped to {self.loss:.3f}, above {self.limit:.3f}"
            if self.loss is not None and self.limit is not None
            else "",
        }[self.reason]
        named = "; ".join(
            f"{source}: {', '.join(map(str, numbers[:SHOWN_SEQUENCES]))}"
            + (" …" if len(numbers) > SHOWN_SEQUENCES else "")
            for source, numbers in self.suspects.items()
        )
        where = "sources and sequences" if self.reason == "gradient_not_finite" else "in sequences of"
        first, last = self.sequences
        return f"step {self.step:,} is bad: {what} ({where} {named}; the step is sequences {first}–{last})"


def nan_if_bad(sequence_losses: torch.Tensor, sources: Sequence[str], rule: SpikeRule | None) -> torch.Tensor:
    """A factor for the loss that stays on the device: 1 for a good step, NaN for a bad one, by the summed cross-entropy
    of each sequence of the global batch in nats, [sequences]. []
    """
    good = torch.isfinite(sequence_losses).all()
    if rule is not None:
        limited = torch.tensor([source in rule.sources for source in sources])
        total = torch.where(limited.to(sequence_losses.device), sequence_losses, 0.0).sum()
        good &= total <= rule.limit * rule.num_labels
    return torch.where(good, 1.0, math.nan)


def finish_step(engine: Engine) -> tuple[float, bool]:
    """The engine's step at the end of a global batch; without effect when the gradient is not finite.

    Returns:
        Gradient norm before clipping, and whether the weights were updated; the same on every rank.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()
        norm = float(engine.get_global_grad_norm())
        return norm, math.isfinite(norm) and engine.was_step_applied()
    # Without ZeRO, DeepSpeed updates with whatever the gradients are. They are averaged over ranks by now.
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        engine.step()
        return norm, True
    engine.zero_grad()
    engine.micro_steps += 1  # what its step would count: where the next global batch begins follows from it
    engine.global_steps += 1
    engine.skipped_steps += 1
    return norm, False


def limited_sum(sequence_losses: Sequence[float], sources: Sequence[str], rule: SpikeRule) -> float:
    """Sum of the losses of the sequences that the rule is about, in nats."""
    return sum(loss for loss, source in zip(sequence_losses, sources, strict=True) if source in rule.sources)


def find_bad(
    step: int,
    sequence_losses: Sequence[float],
    sources: Sequence[str],
    first_sequence: int,
    rule: SpikeRule | None,
) -> BadStep:
    """Says what was wrong with a step that was not applied, by the summed cross-entropy of each sequence in nats."""
    numbered = list(zip(sequence_losses, sources, strict=True))
    bad = [index for index, (loss, _) in enumerate(numbered) if not math.isfinite(loss)]
    reason, mean, limit, rise = "loss_not_finite", None, None, None
    if not bad and rule is not None:
        limited = limited_sum(sequence_losses, sources, rule)
        mean, limit = limited / rule.num_labels, rule.limit
        if limited > limit * rule.num_labels:
            reason, rise = "spike", mean - rule.expected
            order = sorted(range(len(numbered)), key=lambda index: -sequence_losses[index])
            bad = sorted(order[: max(1, len(order) // 8)])
    if not bad:
        reason, bad = "gradient_not_finite", list(range(len(numbered)))
    suspects: dict[str, list[int]] = {}
    for index in bad:
        suspects.setdefault(sources[index], []).append(first_sequence + index)
    sequences = (first_sequence, first_sequence + len(numbered) - 1)
    return BadStep(step, reason, mean, limit, rise, sequences, suspects)


def skip_step(session: Session, bad: BadStep, seen_tokens: int) -> None:
    """Continues after a bad step; the weights are still those from before it.

    Raises:
        RunError: If `stability.on_bad_step` is `stop`, or if too many recent steps were bad.
    """
    settings, state = session.recipe.stability, session.state
    fields = asdict(bad) | {"policy": settings.on_bad_step}
    fields.pop("step")
    message = f"{bad.sentence()}; on_bad_step={settings.on_bad_step}"
    session.telemetry.record("bad_step", bad.step, seen_tokens, message, **fields)
    if settings.on_bad_step == "stop":
        if state.step:
            checkpoints.save_session(session)
        raise stopped_at(bad, f"The state from before it, step {state.step:,}, is saved.")
    first, last = bad.sequences
    newest = None
    if settings.on_bad_step == "rollback":
        newest = latest_checkpoint(session.run.checkpoints)
    if newest is not None:
        session.restore(checkpoints.load(session.engine, newest))
        first = session.state.step * session.recipe.training.global_batch_size
    before = session.state
    session.state = replace(
        before,
        step=bad.step,
        seen_tokens=seen_tokens,
        recent_losses=remember(settings, before.recent_losses, None),
        recent_rises=remember(settings, before.recent_rises, bad.rise),
        skipped_sequences=with_range(before.skipped_sequences, first, last),
    )
    if num_bad(session.state) > settings.max_bad_steps:
        _continue_if_sound(session, bad)
    if newest is not None:
        session.record(
            "rollback",
            f"rolled back to the weights of step {before.step:,}; sequences {first}–{last} are skipped",
            to_step=before.step,
            sequences=(first, last),
        )
        checkpoints.save_session(session)  # so that a resumed run finds the same sequences skipped


def _continue_if_sound(session: Session, bad: BadStep) -> None:
    """After too many bad steps, tells text that became harder from a model that became worse: on held-out text.

    Raises:
        RunError: If the model became worse, or if that many losses or gradients were not finite.
    """
    settings, state = session.recipe.stability, session.state
    if sum(rise is None for rise in state.recent_rises) > settings.max_bad_steps:
        raise not_recovering(settings, state, bad)
    before = state.held_out_loss
    validate_session(session)
    now = session.state.held_out_loss
    assert now is not None
    if before is not None and not now <= before * (1 + WORSE_SHARE) + WORSE_NATS:
        raise not_recovering(settings, state, bad, f" The held-out loss rose from {before:.3f} to {now:.3f}.")
    session.state = replace(session.state, recent_losses=[], recent_rises=[])
    session.record(
        "harder_text",
        f"the loss stays high, and the held-out loss, {now:.3f}, has not risen with it: the text became harder, not the model "
        "worse. Training continues on it",
        held_out_loss=now,
        held_out_loss_before=before,
    )


Remembered = TypeVar("Remembered")


def remember(settings: StabilitySection, recent: list[Remembered], newest: Remembered) -> list[Remembered]:
    """What is known of recent steps, with one more step."""
    return [*recent, newest][-settings.recent_steps :]


def num_bad(state: TrainingState) -> int:
    return sum(losses is None for losses in state.recent_losses)


def with_range(ranges: list[list[int]], first: int, last: int) -> list[list[int]]:
    """Ranges of sequences with one more at their end; joined to the last where they touch."""
    if ranges and ranges[-1][1] + 1 >= first:
        return [*ranges[:-1], [min(first, ranges[-1][0]), last]]
    return [*ranges, [first, last]]


def not_recovering(settings: StabilitySection, state: TrainingState, bad: BadStep, also: str = "") -> RunError:
    """The report of a run that meets one bad step after the other; `state` is the one after the newest of them."""
    ranges = state.skipped_sequences[-SHOWN_RANGES:]
    skipped = ", ".join(f"{first}–{last}" for first, last in ranges)
    return RunError(
        f"The run does not recover: {bad.sentence()}. It is bad step {num_bad(state)} of the last "
        f"{len(state.recent_losses)}. It skipped the sequences {skipped}.{also}",
        allowed=f"At most stability.max_bad_steps={settings.max_bad_steps} among stability.recent_steps="
        f"{settings.recent_steps}. None of them changed the weights; metrics.jsonl names the sequences of each.",
        next_step="If the same source is named repeatedly, its text is to blame: clean or remove it, and start "
        "another run with run_dir=…. Otherwise lower optimizer.peak_learning_rate or raise optimizer.warmup_tokens there. The same "
        "command with stability.on_bad_step=rollback resumes from the last checkpoint and skips sequences.",
    )


def stopped_at(bad: BadStep, saved: str) -> RunError:
    """The report of a run that stops at a bad step."""
    return RunError(
        f"Training stopped at {bad.sentence()}.",
        allowed=f"stability.on_bad_step=stop ends the run there. {saved}",
        next_step="Look at those sequences' text. The same command with stability.on_bad_step=skip or =rollback skips them.",
    )
