"""Tables, caveats and figure of a comparison of evaluations."""

from __future__ import annotations

from collections.abc import Iterator

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsify.compare.evaluations import (
    EvaluatedModel,
    EvaluationComparison,
    TaskDifference,
    same_weights,
)
from sparsify.evaluation.metrics import MetricValue
from sparsify.evaluation.report import count_text, published_scores, score_text
from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import WIDTH_INCHES, Theme
from sparsify.reporting.tables import Table

MANY_TASKS = 4
"""From this many tasks on, a note warns of differences by chance."""


def evaluation_notes(comparison: EvaluationComparison) -> list[str]:
    notes: list[str] = []
    for model in comparison.models:
        notes += _of_model(model)
    notes += _pairing(comparison)
    for one, other in same_weights(comparison.models):
        notes.append(f"{one} and {other} are the same weights.")
    if len(comparison.tasks) >= MANY_TASKS:
        notes.append(
            f"With {len(comparison.tasks)} tasks at 95% each, chance alone gives {0.05 * len(comparison.tasks):.1f} "
            "differences per pair of models on average. Intervals are over items; they do not include the variation "
            "between training seeds."
        )
    return notes


def difference_text(one: TaskDifference) -> str:
    """A difference with its interval: accuracies in percentage points, perplexities in nats."""
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
        listed = ", ".join(f"{task} {difference_text(model.differences[task])}" for task in gains)
        yield (
            f"{model.name} is better than {model.against} on {listed}. {model.against} is not its baseline on the same "
            "tokens: the cause may be the training data and not the activation."
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
        yield (f"{model.name}: its instruction source {source} could not be searched for the items: {problem}")


def _overlap(model: EvaluatedModel, task: str) -> Iterator[str]:
    one = model.differences[task]
    for overlap in one.overlaps:
        if overlap.items_found:
            gain = f" The gain on {task} may be memorisation." if one.verdict == "better" else ""
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
        unpaired = [task for task in model.tasks if task in other.tasks and task not in model.differences]
        if unpaired:
            yield (
                f"{model.name} and {model.against} share no items of {', '.join(unpaired)}: there is no paired difference."
            )
        for task, one in model.differences.items():
            items = (model.tasks[task].score.items, other.tasks[task].score.items)
            if one.difference.items < max(items):
                yield (
                    f"{task}: the difference is over the {one.difference.items:,} items that {model.name} and "
                    f"{model.against} share, of {items[0]:,} and {items[1]:,}."
                )


KINDS = {
    "itself without predictors": "same model without predictors",
    "its dense baseline": "dense baseline",
    "another model": "not a baseline",
}
SIGNS = {"better": "▲", "worse": "▼", "within noise": "≈"}


def evaluation_title(comparison: EvaluationComparison) -> str:
    return f"{comparison.suite}: {' · '.join(model.name for model in comparison.models)}"


def evaluation_tables(comparison: EvaluationComparison) -> list[Table]:
    tables = [_models(comparison), _scores(comparison)]
    if any(model.differences for model in comparison.models):
        tables.append(_differences(comparison))
    if any(model.samples for model in comparison.models):
        tables.append(_samples(comparison))
    return tables


def _models(comparison: EvaluationComparison) -> Table:
    header = ["model", "activation", "training tokens", "mean of accuracies", "zeros", "active", "gate first", "compared with"]  # fmt: skip
    rows = [
        [
            model.name,
            model.ffn_activation + _weights(model) + (", predictors" if model.predictors else ""),
            "–" if model.training_tokens is None else f"{model.training_tokens:,}",
            "–" if model.average is None else score_text(model.average),
            percent(model.zeros),
            count_text(model.active_parameters),
            "–" if model.predictors else count_text(model.gate_first_parameters),
            _against(model),
        ]
        for model in comparison.models
    ]
    return Table("Models", header, rows)


def _weights(model: EvaluatedModel) -> str:
    said = f", {model.weight_sparsity:.0%} of the weights zero" if model.weight_sparsity else ""
    return f"{said}, {model.quantisation}" if model.quantisation else said


def _against(model: EvaluatedModel) -> str:
    if model.against is None:
        return "–"
    return f"{model.against} ({KINDS[model.against_kind]})"


def _scores(comparison: EvaluationComparison) -> Table:
    found = published_scores(comparison.suite)
    models = found[1] if found else {}
    header = ["task", *(model.name for model in comparison.models)]
    header += [f"{model} (published)" for model in models]
    rows = []
    for task in comparison.tasks:
        row = [task]
        for model in comparison.models:
            row.append(score_text(model.tasks[task].score) if task in model.tasks else "–")
        for scores in models.values():
            row.append(f"{100 * scores[task]:.1f}" if task in scores else "–")
        rows.append(row)
    return Table("Scores with 95% intervals", header, rows)


def _samples(comparison: EvaluationComparison) -> Table:
    prompts = dict.fromkeys(one.prompt for model in comparison.models for one in model.samples)
    samples = [{one.prompt: one.text for one in model.samples} for model in comparison.models]
    rows = [
        [" ".join(prompt.split()), model.name, " ".join(texts[prompt].split())]
        for prompt in prompts
        for model, texts in zip(comparison.models, samples, strict=True)
        if prompt in texts
    ]
    return Table("Continuations", ["prompt", "model", "continuation"], rows)


def _differences(comparison: EvaluationComparison) -> Table:
    models = [model for model in comparison.models if model.differences]
    header = ["task"]
    for model in models:
        header += [f"{model.name} − {model.against}", "items in its instruction data"]
    rows = []
    for task in comparison.tasks:
        row = [task]
        for model in models:
            one = model.differences.get(task)
            if one is None:
                row += ["–", "–"]
                continue
            row.append(f"{difference_text(one)} {SIGNS[one.verdict]}")
            row.append(f"{one.overlapping_items:,}" if one.overlaps else "–")
        rows.append(row)
    title = (
        "Paired differences with 95% intervals: accuracies in percentage points, perplexities in nats (lower is better)"
    )
    return Table(title, header, rows)


NAME = "quality"
TITLE = "Quality against active parameters"


def quality_caption(comparison: EvaluationComparison) -> str:
    return (
        f"{_what(comparison)} with its 95% interval over items, against the active parameters of one token: with a perfect "
        "predictor (dot) and with an exact gate-first kernel (end of the bar). Rings: dense models. A model that predictors "
        "mask has only a dot: the neurons that they switch on, plus the predictors."
    )


def draw_quality(comparison: EvaluationComparison, theme: Theme) -> Figure:
    """One point per model; dense models as rings."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.6))
    axes = figure.subplots()
    scale = 100.0 if _mean_of_accuracies(comparison) else 1.0
    for model in comparison.models:
        score = _quality(comparison, model)
        if score is None:
            continue
        colour = theme.baseline if model.is_dense else theme.product
        value = scale * score.value
        low, high = (scale * bound if bound is not None else value for bound in (score.low, score.high))
        axes.plot(
            [model.active_parameters, model.gate_first_parameters],
            [value] * 2,
            color=colour,
            linewidth=1.4,
        )
        axes.errorbar(
            model.active_parameters,
            value,
            yerr=[[value - low], [high - value]],
            fmt="o",
            color=colour,
            markerfacecolor=theme.surface if model.is_dense else colour,
            markersize=7,
            capsize=3,
        )
        axes.annotate(
            model.name,
            (model.active_parameters, value),
            xytext=(8, 8),
            textcoords="offset points",
            color=theme.ink,
        )
    axes.set_xlabel("active parameters of one token")
    axes.set_ylabel(_what(comparison))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: count_text(round(count))))
    axes.margins(x=0.18, y=0.2)
    return figure


def _mean_of_accuracies(comparison: EvaluationComparison) -> bool:
    return all(model.average is not None for model in comparison.models)


def _what(comparison: EvaluationComparison) -> str:
    if _mean_of_accuracies(comparison):
        return "mean of accuracies, per cent"
    first = comparison.tasks[0]
    metric = next(m.tasks[first].metric for m in comparison.models if first in m.tasks)
    return f"{metric} of {first}"


def _quality(comparison: EvaluationComparison, model: EvaluatedModel) -> MetricValue | None:
    if _mean_of_accuracies(comparison):
        return model.average
    task = model.tasks.get(comparison.tasks[0])
    return None if task is None else task.score
