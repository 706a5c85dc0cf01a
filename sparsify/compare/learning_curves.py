"""Figures of losses and zeros of all runs over training tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from sparsify.compare.schema import ComparedRun, Comparison, ValidationPoint
from sparsify.reporting.plotting import WIDTH_INCHES, Theme

OWN_BASELINE = "dense baseline of the same colour"
MARKERS = "osD^vP*X"
PANEL_INCHES = 2.7
LEGEND_ROW_INCHES = 0.22
LEGEND_CHARACTERS = 110
"""Characters that fit into one row of a legend."""


@dataclass(frozen=True)
class LearningCurve:
    """The line of a run, or of the baseline in a run's folder."""

    name: str
    run: ComparedRun
    """The run itself, or the run that this is the baseline of."""
    points: list[ValidationPoint]
    dense: bool
    colour: str
    marker: str


def draw_loss(comparison: Comparison, theme: Theme) -> Figure:
    """Validation loss over training: one panel if it is comparable, otherwise one per source."""
    curves = list(_curves(comparison, theme))
    if comparison.losses_comparable:
        figure, (axes,) = _panels(1, curves)
        for curve in curves:
            _plot(axes, curve, [(point.tokens, point.loss) for point in curve.points])
        axes.set_ylabel("nats per token")
        return figure
    sources = [name for name in comparison.sources if any(run.sources[name].comparable for run in comparison.runs)]
    figure, panels = _panels(len(sources), curves)
    for source, axes in zip(sources, panels, strict=True):
        axes.set_title(f"{source}, nats per token")
        for curve in curves:
            if curve.run.sources[source].comparable:
                _plot(axes, curve, [(point.tokens, point.sources[source]) for point in curve.points])
    return figure


def draw_zeros(comparison: Comparison, theme: Theme) -> Figure:
    """Share of exact zeros over training, without dense runs."""
    curves = [curve for curve in _curves(comparison, theme) if not curve.dense]
    figure, (axes,) = _panels(1, curves)
    for curve in curves:
        known = [(point.tokens, point.zeros) for point in curve.points if point.zeros is not None]
        _plot(axes, curve, known)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def has_loss(comparison: Comparison) -> bool:
    comparable = (source.comparable for run in comparison.runs for source in run.sources.values())
    return comparison.losses_comparable or any(comparable)


def series_colours(theme: Theme, count: int) -> list[str]:
    """Colours that also differ in lightness: the theme's three, or steps through its heat map."""
    if count <= 3:
        return [theme.product, theme.gate, theme.up][:count]
    steps = (0.25 + 0.75 * index / (count - 1) for index in range(count))
    return ["#" + "".join(f"{round(255 * part):02x}" for part in theme.heat(step)[:3]) for step in steps]


def _curves(comparison: Comparison, theme: Theme) -> Iterator[LearningCurve]:
    baselines = {run.baseline.path for run in comparison.runs if run.baseline is not None}
    coloured = [run for run in comparison.runs if run.path not in baselines]
    colours = dict(zip((run.path for run in coloured), series_colours(theme, len(coloured)), strict=True))
    paths = {run.path for run in comparison.runs}
    for index, run in enumerate(comparison.runs):
        colour = colours.get(run.path, theme.baseline)
        marker = MARKERS[index % len(MARKERS)]
        yield LearningCurve(run.name, run, run.points, run.is_dense, colour, marker)
        if run.baseline is not None and run.baseline.path not in paths:
            yield LearningCurve(OWN_BASELINE, run, run.baseline.points, True, colour, marker)


def _plot(axes: Axes, curve: LearningCurve, values: Sequence[tuple[int, float]]) -> None:
    finite = [(tokens, value) for tokens, value in values if math.isfinite(value)]
    axes.plot(
        [tokens for tokens, _ in finite],
        [value for _, value in finite],
        _dashes(curve),
        color=curve.colour,
        marker=curve.marker,
        markersize=3.5,
        linewidth=1.2 if curve.dense else 1.8,
    )


def _panels(count: int, curves: Sequence[LearningCurve]) -> tuple[Figure, list[Axes]]:
    """Panels with a shared x axis, below one legend of all curves."""
    columns = 2 if count in (2, 4) else min(count, 3)
    rows = -(-count // columns)
    entries = _legend(curves)
    longest = max(map(len, entries)) + 6
    legend_columns = max(1, min(4, LEGEND_CHARACTERS // longest))
    legend_inches = LEGEND_ROW_INCHES * -(-len(entries) // legend_columns)
    height_inches = PANEL_INCHES * rows + legend_inches + (0.9 if count == 1 else 0.4)
    figure = Figure(figsize=(WIDTH_INCHES, height_inches))
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True).flat)
    for axes in grid[count:]:
        axes.remove()
    for axes in grid[:count]:
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(axis="x")
    for axes in grid[:count][-columns:]:
        axes.set_xlabel("training tokens")
        axes.tick_params(labelbottom=True)
    figure.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper left",
        ncols=legend_columns,
        columnspacing=1.6,
    )
    return figure, grid[:count]


def _legend(curves: Sequence[LearningCurve]) -> dict[str, Line2D]:
    """One entry per run, and one entry for all baselines in runs' own folders, which have the colour of their run."""
    entries = {
        curve.name: Line2D(
            [],
            [],
            linestyle=_dashes(curve),
            color=curve.colour,
            marker=curve.marker,
            markersize=4,
        )
        for curve in curves
        if curve.points is curve.run.points
    }
    own = [curve for curve in curves if curve.points is not curve.run.points]
    if own:
        colour = own[0].colour if len(own) == 1 else "0.5"
        entries[OWN_BASELINE] = Line2D([], [], linestyle="--", color=colour, linewidth=1.2)
    return entries


def _dashes(curve: LearningCurve) -> Literal["-", "--"]:
    return "--" if curve.dense else "-"
