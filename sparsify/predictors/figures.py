"""The pictures of a judgement: what a threshold saves, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparsify.predictors.schema import Judgement
from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.themes import Theme

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
    marks = zip(judgement.ways, "sD^", (theme.control, theme.gate, theme.ink), strict=True)
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
            theme.control,
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
