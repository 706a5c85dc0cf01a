"""Results as tables: on the terminal, and as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from rich.table import Table

from sparsify.evaluation.published import published_scores
from sparsify.evaluation.results import EvaluationResults, TaskResult
from sparsify.evaluation.scores import Measured
from sparsify.sparsity.percent import percent
from sparsify.terminal import figures_table


@dataclass(frozen=True)
class Rows:
    """A table as text."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def score_text(score: Measured) -> str:
    """A score with half the width of its interval: accuracies in per cent, perplexities as they are."""
    scale, digits = (100.0, 1) if score.kind == "mean" else (1.0, 2)
    value = f"{scale * score.value:.{digits}f}"
    if score.low is None or score.high is None:
        return value
    if score.kind == "perplexity":
        return f"{value} [{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return f"{value} ± {scale * (score.high - score.low) / 2:.{digits}f}"


def count_text(count: int) -> str:
    """A number of parameters: 134.5M, 2.17B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def own_rows(results: EvaluationResults) -> Rows:
    """One row a task: score, and what was counted in the same pass."""
    masks = results.predictors
    header = ["task", "shots", "items", "metric", "score", "zeros (gate)", "active"]
    header += [] if masks is None else ["switched on"]
    rows = [_row(task) for task in results.tasks]
    if results.average is not None:
        items = f"{results.average.items:,}"
        rows.append(
            [
                "mean of accuracies",
                "",
                items,
                "",
                score_text(results.average),
                *[""] * (len(header) - 5),
            ]
        )
    total = results.tasks[0].active_parameters.total
    active = "with a perfect predictor / with an exact gate-first kernel"
    how = f"{results.ffn_activation}, {results.dtype}"
    if masks is not None:
        how += f", neurons that {masks.folder} scores above {masks.threshold:g}"
        active = (
            f"with these predictors, whose {count_text(masks.parameters)} are among them. Switched on: share of the neurons "
            "(and of those that fire in the masked model)"
        )
    title = f"{results.model}: suite {results.suite} ({how})"
    notes = [
        "Scores with 95% intervals over items; accuracies in per cent. Exact zeros of gate times up, and of the gate "
        f"alone, over all tokens of the task. Active parameters, of {count_text(total)}: {active}.",
        *results.notes,
    ]
    return Rows(title, header, rows, notes)


def published_rows(results: EvaluationResults) -> Rows | None:
    """Our scores beside the published ones of the same suite; None if nobody published any."""
    found = published_scores(results.suite)
    if found is None:
        return None
    about, models = found
    ours = {task.name: task.score for task in results.tasks if task.name in about.columns}
    header = ["task", "this model", *(f"{model} (published)" for model in models)]
    rows = [
        [task, score_text(ours[task]) if task in ours else "–"]
        + [f"{100 * scores[task]:.1f}" for scores in models.values()]
        for task in about.columns
    ]
    whole = len(ours) == len(about.columns)
    mean = f"{100 * fmean(one.value for one in ours.values()):.1f}" if whole else "–"
    means = [f"{100 * fmean(scores.values()):.1f}" for scores in models.values()]
    rows.append(["mean", mean, *means])
    notes = [f"Published: {about.source}, not measured here. {about.caveat}"]
    return Rows("Beside published scores", header, rows, notes)


def results_table(results: EvaluationResults) -> Table:
    """The results as the terminal shows them."""
    return terminal_table(own_rows(results))


def terminal_table(rows: Rows) -> Table:
    """A table as the terminal shows it, without its notes."""
    table = figures_table(rows.title)
    for index, column in enumerate(rows.header):
        # A narrow terminal breaks lines; a number that it cut short would be another number.
        longest = max(len(column), *(len(row[index]) for row in rows.rows))
        justify = "left" if column in ("task", "metric", "") else "right"
        table.add_column(column, justify=justify, no_wrap=True, min_width=longest)
    for row in rows.rows:
        table.add_row(*row)
    return table


def markdown(rows: Rows) -> str:
    """A table as Markdown, with its notes below."""
    lines = [rows.header, ["---"] * len(rows.header), *rows.rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([f"## {rows.title}", table, *rows.notes]) + "\n"


def _row(task: TaskResult) -> list[str]:
    active = task.active_parameters
    cells = [
        task.name,
        str(task.shots),
        f"{task.score.items:,}",
        task.metric,
        score_text(task.score),
        f"{percent(task.product_zeros)} ({percent(task.gate_zeros)})",
        f"{count_text(active.perfect_predictor)} / {count_text(active.gate_first)}",
    ]
    if active.predicted is not None:
        cells[-1] = count_text(active.predicted)
        cells.append(f"{percent(task.predicted_on)} ({percent(task.predicted_recall)})")
    return cells
