"""The pictures of a judgement: what a threshold saves, and what it costs.

Writes a judgement: judgement.json, judgement.csv, pictures and one page; and shows it in a terminal.

What training predictors found, for a terminal.
"""

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
from rich.markup import escape
from rich.text import Text

from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.predictors.format import Predictors
from sparsify.predictors.schema import JUDGEMENT_FILE, Judgement, Point, Way
from sparsify.reporting.html import page_environment
from sparsify.reporting.numbers import count, percent
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image, page_figure
from sparsify.reporting.tables import Table

MAX_RISE = 1.0
"""Rise of the loss in nats beyond which the axis does not go."""


@dataclass(frozen=True)
class PictureOf:
    """One picture and its words."""

    name: str
    title: str
    caption: str
    draw: Callable[[Judgement, Theme], Figure]


def draw_cost(judgement: Judgement, theme: Theme) -> Figure:
    """Loss against the bytes that a token reads."""
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    axes = figure.add_subplot()
    points = judgement.points
    read = [point.ffn_bytes for point in points]
    rise = [point.loss_rise for point in points]
    axes.plot(read, rise, "o-", color=theme.product, label="predicted masks", markersize=5)
    _ways(axes, judgement, theme)
    axes.axhline(judgement.max_loss_rise, color=theme.line, linewidth=1.2, zorder=0)
    chosen = judgement.chosen_point
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
    highest = max(0.02, *rise, 1.5 * judgement.max_loss_rise)
    axes.set(
        xlabel="feed-forward bytes that a token reads, predictors included",
        ylabel="rise of the loss, nats per token",
        ylim=(-0.05 * min(highest, MAX_RISE), 1.06 * min(highest, MAX_RISE)),
        xlim=(0, max(1.04, *read)),
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def _ways(axes: Axes, judgement: Judgement, theme: Theme) -> None:
    marks = zip(judgement.ways, "sD^", (theme.baseline, theme.gate, theme.ink), strict=True)
    for way, mark, colour in marks:
        axes.plot([way.ffn_bytes], [0.0], mark, color=colour, label=way.name, markersize=7)


def draw_recall(judgement: Judgement, theme: Theme) -> Figure:
    """Recall, precision and the share that is on, against the threshold."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.9))
    axes = figure.add_subplot()
    thresholds = [point.threshold for point in judgement.points]
    rows = (
        ("recall", [point.recall for point in judgement.points], theme.product, "o-"),
        ("precision", [point.precision for point in judgement.points], theme.gate, "s-"),
        ("neurons switched on", [point.on_share for point in judgement.points], theme.up, "^-"),
        (
            "recall if always the same were on",
            [point.static_recall for point in judgement.points],
            theme.baseline,
            ":",
        ),
    )
    for label, values, colour, style in rows:
        shown = [float("nan") if value is None else value for value in values]
        axes.plot(thresholds, shown, style, color=colour, label=label, markersize=4.5)
    if judgement.chosen is not None:
        axes.axvline(judgement.chosen, color=theme.line, linewidth=1.2, zorder=0)
    axes.set(xlabel="threshold of the score", ylim=(0, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


FIGURES = (
    PictureOf(
        "cost",
        "What a threshold saves, and what it costs",
        "To the left fewer bytes are read, downwards the model stays what it is. The line is the limit on the loss. Gate first "
        "is exact and needs no predictor, so a threshold to its right saves nothing.",
        draw_cost,
    ),
    PictureOf(
        "recall",
        "Recall, precision and what is switched on",
        "Measured inside the masked model. Recall alone says little: switching everything on makes it perfect.",
        draw_recall,
    ),
)


PAGE_FILE = "index.html"
TABLE_FILE = "judgement.csv"
PACKAGE, TEMPLATE_FILE = "sparsify.predictors", "page.html.j2"


def write_judgement(judgement: Judgement, to: Path) -> None:
    """Writes a judgement into a folder, in place of one that is there already.

    Raises:
        StorageError: If the folder cannot be written, or holds something else.
    """
    refuse_foreign_folder(to, JUDGEMENT_FILE, "judgement")
    with atomic_folder(to) as fresh:
        text = judgement.model_dump_json(indent=2) + "\n"
        (fresh / JUDGEMENT_FILE).write_text(text, encoding="utf-8")
        _write_table(judgement, fresh / TABLE_FILE)
        for figure in FIGURES:
            png = image(partial(figure.draw, judgement), figure.name, LIGHT, "png")
            (fresh / f"{figure.name}.png").write_bytes(png)
        (fresh / PAGE_FILE).write_text(render_page(judgement), encoding="utf-8")


def render_page(judgement: Judgement) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    figures = [
        page_figure(partial(one.draw, judgement), one.name, one.title, one.caption)
        for one in FIGURES
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(judgement=judgement, figures=figures)


def _write_table(judgement: Judgement, path: Path) -> None:
    columns = [name for name in Point.model_fields if name != "layers"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(way.model_dump() for way in [*judgement.ways, *judgement.points])


def judgement_summary(judgement: Judgement, folder: Path) -> RenderableType:
    """The curve as a table, the verdict, and where the page lies."""
    columns = ("", "recall", "precision", "on", "loss", "perplexity", "bytes", "blocks", "model")
    table = Table(
        f"{judgement.model}: predictors judged on {judgement.num_tokens:,} tokens", columns
    )
    for way in judgement.ways:
        table.add(*_cells(way, None, None))
    table.add_rule()
    for point in judgement.points:
        style = "bold" if point.threshold == judgement.chosen else ""
        table.add(*(Text(cell, style) for cell in _cells(point, point.recall, point.precision)))
    notes = (
        "on: neurons whose weights are read · bytes: of the feed-forward weights, predictors included\n"
        "blocks, model: predicted speed-up over dense, if bytes are what costs"
    )
    return Group(
        "",
        table,
        f"[dim]{notes}[/dim]",
        f"[bold]{escape(judgement.verdict)}[/bold]",
        f"[bold]Page[/bold]  {escape(str(folder / PAGE_FILE))}",
    )


def _cells(way: Way, recall: float | None, precision: float | None) -> list[str]:
    return [
        way.name,
        percent(recall),
        percent(precision),
        percent(way.on_share),
        f"{way.loss:.4f}",
        f"{way.perplexity:.3f}",
        percent(way.ffn_bytes),
        f"{way.ffn_speedup:.2f}×",
        f"{way.model_speedup:.2f}×",
    ]


MOST_ROWS = 40


def training_summary(predictors: Predictors, folder: Path, model: str) -> RenderableType:
    """Rank, recall and share of every block, and what to type next.

    Args:
        predictors: What was trained.
        folder: Where they lie.
        model: The model as the user named it.
    """
    facts = predictors.facts
    columns = ("block", "rank", "recall", "switched on", "fire")
    table = Table(
        f"Predictors of the {facts.input} input, at the score 0 on held-out text", columns
    )
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
        f"[bold]Predictors[/bold]  {escape(str(folder))}",
        f"Next: [cyan]sparsify predictors judge {escape(model)} --predictors {escape(str(folder))}[/cyan]",
    )
