"""The picture of a series of runs: final loss of each source against the one setting that differs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

from sparsify.comparison.schema import ComparedRun, Comparison
from sparsify.comparison.settings import short_settings
from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.themes import Theme

MEAN = "plain mean"
MAX_COLUMNS = 4
PANEL_INCHES = 2.1
LOG_RATIO = 20
"""A setting whose values spread over more than this has a logarithmic axis."""
MAX_TICKS = 8

Line = list[tuple[float, float]]
"""Value of the setting and loss, by value."""


def series_of(comparison: Comparison) -> list[ComparedRun]:
    """The finished runs of a series, in the order of its setting; dense controls among the runs are no part of it."""
    key = comparison.swept_setting
    if key is None:
        return []
    controls = {run.control.path for run in comparison.runs if run.control is not None}
    runs = [run for run in comparison.runs if run.path not in controls and run.finished]
    return sorted(runs, key=lambda run: _value(run, key))


def has_series(comparison: Comparison) -> bool:
    """Whether a source was measured comparably at two values of the setting or more."""
    key, runs = comparison.swept_setting, series_of(comparison)
    lines = [_line(runs, key, name) for name in comparison.sources] if key else []
    return any(len({value for value, _ in line}) > 1 for line in lines)


def draw_setting(comparison: Comparison, theme: Theme) -> Figure:
    """A panel a source and one for their plain mean; below each, dashed, the dense controls on the same scale."""
    key = comparison.swept_setting or ""
    runs = series_of(comparison)
    lines = {name: _line(runs, key, name) for name in comparison.sources}
    dense = {name: _control_line(runs, key, name) for name in comparison.sources}
    if len(lines) > 1:
        lines[MEAN] = _mean(list(lines.values()))
        dense[MEAN] = _mean(list(dense.values()))
    names = [name for name, line in lines.items() if line]
    has_control = any(dense.values())
    columns = min(len(names), MAX_COLUMNS)
    blocks = -(-len(names) // columns)
    rows = 2 if has_control else 1
    figure = Figure(figsize=(WIDTH_INCHES, 0.7 + PANEL_INCHES * rows * blocks))
    grid = figure.subplots(rows * blocks, columns, squeeze=False, sharex=True)
    span = _span([*lines.values(), *dense.values()])
    for axes in grid.flat:
        axes.set_visible(False)
    for index, name in enumerate(names):
        block, column = divmod(index, columns)
        upper = grid[block * rows, column]
        colour = theme.ink if name == MEAN else theme.product
        _draw(upper, lines[name], span, colour, "-")
        upper.set_title(name)
        lowest = upper
        if has_control and dense[name]:
            lowest = grid[block * rows + 1, column]
            _draw(lowest, dense[name], span, colour, "--")
            lowest.set_title("dense control", color=theme.muted, fontsize=9)
        _setting_axis(lowest, [_value(run, key) for run in runs], short_settings([key])[key])
    for axes in grid[:, 0]:
        axes.set_ylabel("nats per token")
    return figure


def _value(run: ComparedRun, key: str) -> float:
    value = run.settings[key]
    assert isinstance(value, int | float)
    return value


def _line(runs: Sequence[ComparedRun], key: str, source: str) -> Line:
    of_source = [(_value(run, key), run.sources[source]) for run in runs]
    return [
        (value, one.loss)
        for value, one in of_source
        if one.loss is not None and one.comparable and math.isfinite(one.loss)
    ]


def _control_line(runs: Sequence[ComparedRun], key: str, source: str) -> Line:
    """The controls, as far as they are finished too."""
    line = []
    for run in runs:
        own, control = run.sources[source], run.control
        if control is None or control.tokens != run.measured_tokens or not own.comparable:
            continue
        if own.loss is not None and math.isfinite(control.source_gaps[source]):
            line.append((_value(run, key), own.loss - control.source_gaps[source]))
    return line


def _mean(lines: Sequence[Line]) -> Line:
    """Mean over all lines, at the values that all of them have."""
    losses = [dict(line) for line in lines]
    values = set(losses[0]).intersection(*losses)
    return [(value, fmean(one[value] for one in losses)) for value in sorted(values)]


def _span(lines: Sequence[Line]) -> float:
    """The height of every panel in nats: equal slopes look equal."""
    spans = [max(losses) - min(losses) for line in lines if (losses := [loss for _, loss in line])]
    return 1.6 * max(spans) or 0.01


def _draw(axes: Axes, line: Line, span: float, colour: str, dashes: str) -> None:
    axes.set_visible(True)
    values, losses = zip(*line, strict=True)
    axes.plot(values, losses, dashes, color=colour, marker="o", markersize=4, linewidth=1.8)
    for value, loss in line:
        axes.annotate(
            f"{loss:.3f}",
            (value, loss),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
        )
    middle = (min(losses) + max(losses)) / 2
    axes.set_ylim(middle - span / 2, middle + span / 2)
    axes.yaxis.set_major_formatter(FormatStrFormatter("%.2f" if span > 0.1 else "%.3f"))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.margins(x=0.14)


def _setting_axis(axes: Axes, values: Sequence[float], label: str) -> None:
    if min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_xscale("log")
    if len(set(values)) <= MAX_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(sorted(set(values))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(label)
    axes.tick_params(labelbottom=True)
