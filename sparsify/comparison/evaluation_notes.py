"""What must be known before a difference between two evaluations is believed, in words."""

from __future__ import annotations

from collections.abc import Iterator

from sparsify.comparison.evaluations import (
    EvaluatedModel,
    EvaluationComparison,
    TaskDifference,
    same_weights,
)

MANY_TASKS = 4
"""From so many tasks on, one that differs by chance is to be expected now and then."""


def evaluation_notes(comparison: EvaluationComparison) -> list[str]:
    """The notes of a comparison, most important first."""
    notes: list[str] = []
    for model in comparison.models:
        notes += _of_model(model)
    notes += _pairing(comparison)
    for one, other in same_weights(comparison.models):
        notes.append(f"{one} and {other} are the same weights.")
    if len(comparison.tasks) >= MANY_TASKS:
        notes.append(
            f"With {len(comparison.tasks)} tasks at 95% each, chance alone shows {0.05 * len(comparison.tasks):.1f} "
            "differences per pair of models on average. Intervals are over items: what another training seed would change "
            "is not in them."
        )
    return notes


def difference_text(one: TaskDifference) -> str:
    """A difference with its interval: accuracies in points, perplexities in nats."""
    paired = one.difference
    scale, digits = (100.0, 1) if paired.kind == "mean" else (1.0, 3)
    if paired.low is None or paired.high is None:
        return f"{scale * paired.value:+.{digits}f}"
    low, high = scale * paired.low, scale * paired.high
    return f"{scale * paired.value:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def _of_model(model: EvaluatedModel) -> Iterator[str]:
    by_verdict: dict[str, list[str]] = {}
    for task, one in model.differences.items():
        by_verdict.setdefault(one.verdict, []).append(task)
    gains = by_verdict.get("better", [])
    if gains and model.against_kind == "another model":
        told = ", ".join(f"{task} {difference_text(model.differences[task])}" for task in gains)
        yield (
            f"{model.name} is better than {model.against} on {told}. {model.against} is no control of it on the same tokens: "
            "the training data may have done this, not the activation."
        )
    for task in gains:
        yield from _overlap(model, task)
    for task, one in model.differences.items():
        if task not in gains and one.overlapping_items:
            yield from _overlap(model, task)
    noise = by_verdict.get("within noise", [])
    if noise:
        yield f"{model.name} against {model.against}: within noise on {', '.join(noise)}."
    unread = {
        overlap.source: overlap.problem
        for one in model.differences.values()
        for overlap in one.overlaps
        if overlap.problem
    }
    for source, problem in unread.items():
        yield (
            f"{model.name}: whether its instruction source {source} holds the items is not known: {problem}"
        )


def _overlap(model: EvaluatedModel, task: str) -> Iterator[str]:
    one = model.differences[task]
    for overlap in one.overlaps:
        if overlap.items_found:
            gain = f" The gain on {task} may be memory." if one.verdict == "better" else ""
            yield (
                f"{model.name}, {task}: {overlap.items_found:,} of {overlap.items:,} items share 13 words in a row with its "
                f"instruction source {overlap.source} ({overlap.documents_overlapping:,} of {overlap.documents_read:,} "
                f"documents).{gain}"
            )


def _pairing(comparison: EvaluationComparison) -> Iterator[str]:
    for model in comparison.models:
        if model.against is None:
            continue
        other = next(one for one in comparison.models if one.name == model.against)
        unpaired = [
            task for task in model.tasks if task in other.tasks and task not in model.differences
        ]
        if unpaired:
            yield (
                f"{model.name} and {model.against} were not asked the same items of {', '.join(unpaired)}: no difference is given."
            )
        for task, one in model.differences.items():
            asked = (model.tasks[task].score.items, other.tasks[task].score.items)
            if one.difference.items < max(asked):
                yield (
                    f"{task}: {one.difference.items:,} items that both {model.name} and {model.against} were asked, of "
                    f"{asked[0]:,} and {asked[1]:,}."
                )
