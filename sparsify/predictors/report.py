"""Reports on predictors: figures, evaluation.json, evaluation.csv, one HTML page, and terminal summaries."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.predictors.engines import ENGINES
from sparsify.predictors.format import Predictors
from sparsify.predictors.schema import (
    EVALUATION_FILE,
    PredictorEvaluation,
    ReadingCost,
    ThresholdPoint,
)
from sparsify.reporting.html import page_environment
from sparsify.reporting.numbers import count, percent
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image, page_figure
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked

MAX_RISE = 1.0
"""Upper end of the loss axis, nats."""


@dataclass(frozen=True)
class EvaluationFigure:
    name: str
    title: str
    caption: str
    draw: Callable[[PredictorEvaluation, Theme], Figure]


def draw_cost(evaluation: PredictorEvaluation, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.add_subplot()
    points = evaluation.points
    read = [point.ffn_bytes for point in points]
    rise = [point.loss_rise for point in points]
    axes.plot(read, rise, "o-", color=theme.product, label="predicted masks", markersize=5)
    _references(axes, evaluation, theme)
    axes.axhline(evaluation.max_loss_rise, color=theme.line, linewidth=1.2, zorder=0)
    chosen = evaluation.chosen_point
    if chosen is not None:
        axes.plot(
            [chosen.ffn_bytes],
            [chosen.loss_rise],
            "o",
            markersize=12,
            markerfacecolor="none",
            color=theme.up,
            label=f"chosen: above {chosen.threshold:g}",
        )
    highest = max(0.02, *rise, 1.5 * evaluation.max_loss_rise)
    axes.set(
        xlabel="feed-forward bytes that a token reads, predictors included",
        ylabel="rise of the loss, nats per token",
        ylim=(-0.05 * min(highest, MAX_RISE), 1.06 * min(highest, MAX_RISE)),
        xlim=(0, max(1.04, *read)),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _references(axes: Axes, evaluation: PredictorEvaluation, theme: Theme) -> None:
    marks = {"dense": ("s", theme.baseline), "exact": ("D", theme.gate), "perfect": ("^", theme.ink)}
    for cost in evaluation.references:
        mark, colour = next(marks[word] for word in marks if cost.name.startswith(word))
        axes.plot([cost.ffn_bytes], [0.0], mark, color=colour, label=cost.name, markersize=7)


def draw_recall(evaluation: PredictorEvaluation, theme: Theme) -> Figure:
    """Recall, precision and the share that is on, against the threshold."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.9))
    axes = figure.add_subplot()
    thresholds = [point.threshold for point in evaluation.points]
    rows = (
        ("recall", [point.recall for point in evaluation.points], theme.product, "o-"),
        ("precision", [point.precision for point in evaluation.points], theme.gate, "s-"),
        ("neurons switched on", [point.on_share for point in evaluation.points], theme.up, "^-"),
        (
            "recall of a fixed mask of the same size",
            [point.static_recall for point in evaluation.points],
            theme.baseline,
            ":",
        ),
    )
    for label, values, colour, style in rows:
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(thresholds, shown, style, color=colour, label=label, markersize=4.5)
    if evaluation.chosen is not None:
        axes.axvline(evaluation.chosen, color=theme.line, linewidth=1.2, zorder=0)
    axes.set(xlabel="threshold of the score", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


FIGURES = (
    EvaluationFigure(
        "cost",
        "Loss against bytes read",
        "Further left, fewer bytes are read; further down, the loss is closer to the exact model. The line is the limit on "
        "the loss. A threshold to the right of gate first, which is exact and needs no predictor, saves nothing; an engine "
        "without it has no such mark.",
        draw_cost,
    ),
    EvaluationFigure(
        "recall",
        "Recall, precision and share of neurons switched on",
        "Measured inside the masked model. Recall alone says little: it is perfect if everything is switched on.",
        draw_recall,
    ),
)


PAGE_FILE = "index.html"
TABLE_FILE = "evaluation.csv"
PACKAGE, TEMPLATE_FILE = "sparsify.predictors", "page.html.j2"


def write_evaluation(evaluation: PredictorEvaluation, to: Path) -> None:
    refuse_foreign_folder(to, EVALUATION_FILE, "evaluation")
    with atomic_folder(to) as fresh:
        text = evaluation.model_dump_json(indent=2) + "\n"
        (fresh / EVALUATION_FILE).write_text(text, encoding="utf-8")
        _write_table(evaluation, fresh / TABLE_FILE)
        for figure in FIGURES:
            png = image(partial(figure.draw, evaluation), figure.name, LIGHT, "png")
            (fresh / f"{figure.name}.png").write_bytes(png)
        (fresh / PAGE_FILE).write_text(render_page(evaluation), encoding="utf-8")


def render_page(evaluation: PredictorEvaluation) -> str:
    figures = [page_figure(partial(one.draw, evaluation), one.name, one.title, one.caption) for one in FIGURES]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    engine = ENGINES[evaluation.engine].title
    return template.render(evaluation=evaluation, engine=engine, figures=figures)


def _write_table(evaluation: PredictorEvaluation, path: Path) -> None:
    columns = [name for name in ThresholdPoint.model_fields if name != "layers"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(cost.model_dump() for cost in [*evaluation.references, *evaluation.points])


def evaluation_summary(evaluation: PredictorEvaluation, folder: Path) -> RenderableType:
    columns = ("", "recall", "precision", "on", "loss", "perplexity", "bytes", "blocks", "model")
    engine = ENGINES[evaluation.engine].title
    table = Table(f"{evaluation.model}: predictors evaluated for {engine} on {evaluation.num_tokens:,} tokens", columns)
    for cost in evaluation.references:
        table.add(*_cells(cost, cost.recall, cost.precision))
    table.add_rule()
    for point in evaluation.points:
        style = "bold" if point.threshold == evaluation.chosen else ""
        table.add(*(Text(cell, style) for cell in _cells(point, point.recall, point.precision)))
    notes = (
        "on: neurons whose weights are read · bytes: of the feed-forward weights, predictors included\n"
        "blocks, model: predicted speed-up over dense, if time is proportional to bytes read"
    )
    return Group(
        "",
        table,
        Text(notes, "dim"),
        Text(evaluation.verdict, "bold"),
        marked("[bold]Page[/bold]  {}", folder / PAGE_FILE),
    )


def _cells(cost: ReadingCost, recall: float | None, precision: float | None) -> list[str]:
    return [
        cost.name,
        percent(recall),
        percent(precision),
        percent(cost.on_share),
        f"{cost.loss:.4f}",
        f"{cost.perplexity:.3f}",
        percent(cost.ffn_bytes),
        f"{cost.ffn_speedup:.2f}×",
        f"{cost.model_speedup:.2f}×",
    ]


MOST_ROWS = 40


def training_summary(predictors: Predictors, folder: Path, model: str) -> RenderableType:
    facts = predictors.facts
    columns = ("block", "rank", "recall", "switched on", "fire")
    table = Table(f"Predictors of the {facts.input} input, at the score 0 on held-out text", columns)
    for name, block in list(facts.blocks.items())[:MOST_ROWS]:
        shares = (block.recall, block.on_share, block.firing_share)
        table.add(name, str(block.rank), *map(percent, shares))
    left = len(facts.blocks) - MOST_ROWS
    ffn = 3 * facts.hidden * facts.neurons * facts.num_layers * facts.num_experts
    size = predictors.num_parameters
    return Group(
        "",
        table,
        *([f"and {left} more in predictors.json"] if left > 0 else []),
        f"{count(size)} parameters, {size / ffn:.1%} of the feed-forward weights.",
        marked("[bold]Predictors[/bold]  {}", folder),
        marked("Next: [cyan]sparsify predictors evaluate {} --predictors {}[/cyan]", model, folder),
    )
