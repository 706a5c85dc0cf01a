"""Figures of a comparison, in the order of the page, and the figure of a sweep: final losses against the swept setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator

from sparsify.compare.learning_curves import draw_loss, draw_zeros, has_loss
from sparsify.compare.schema import ComparedRun, Comparison
from sparsify.recipe.identity import short_settings
from sparsify.reporting.plotting import WIDTH_INCHES, Theme

MEAN = "unweighted mean"
MAX_COLUMNS = 4
PANEL_INCHES = 2.1
LOG_RATIO = 20
"""Ratio of the largest to the smallest value of a setting above which its axis is logarithmic."""
MAX_TICKS = 8

Line = list[tuple[float, float]]
"""(value of the setting, loss) of every run, sorted by value."""


def series_of(comparison: Comparison) -> list[ComparedRun]:
    """The finished runs of a sweep, sorted by its setting, without the dense baselines."""
    key = comparison.swept_setting
    if key is None:
        return []
    baselines = {run.baseline.path for run in comparison.runs if run.baseline is not None}
    runs = [run for run in comparison.runs if run.path not in baselines and run.finished]
    return sorted(runs, key=lambda run: _value(run, key))


def has_series(comparison: Comparison) -> bool:
    """Whether a source has comparable losses at two or more values of the setting."""
    key, runs = comparison.swept_setting, series_of(comparison)
    lines = [_line(runs, key, partial(_loss, source=name)) for name in comparison.sources if key]
    return any(len({value for value, _ in line}) > 1 for line in lines)


def repeats(runs: Sequence[ComparedRun], key: str) -> bool:
    return len({_value(run, key) for run in runs}) < len(runs)


def by_value(line: Line) -> Line:
    values = sorted({value for value, _ in line})
    return [(value, fmean(loss for one, loss in line if one == value)) for value in values]


def plain_means(runs: Sequence[ComparedRun], key: str) -> Line:
    """Unweighted mean of the sources' losses, for every run that has it."""
    return _line(runs, key, partial(_loss, source=MEAN))


def draw_setting(comparison: Comparison, theme: Theme) -> Figure:
    """One panel per source and one for the unweighted mean; below each, dashed, the dense baselines on the same scale."""
    key = comparison.swept_setting or ""
    runs = series_of(comparison)
    shown = [*comparison.sources, *([MEAN] if len(comparison.sources) > 1 else [])]
    lines = {name: _line(runs, key, partial(_loss, source=name)) for name in shown}
    dense = {name: _line(runs, key, partial(_baseline_loss, source=name)) for name in shown}
    names = [name for name, line in lines.items() if line]
    has_baseline = any(dense.values())
    columns = min(len(names), MAX_COLUMNS)
    blocks = -(-len(names) // columns)
    rows = 2 if has_baseline else 1
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
        if has_baseline and dense[name]:
            lowest = grid[block * rows + 1, column]
            _draw(lowest, dense[name], span, colour, "--")
            lowest.set_title("dense baseline", color=theme.muted, fontsize=9)
        _setting_axis(lowest, [_value(run, key) for run in runs], short_settings([key])[key])
    for axes in grid[:, 0]:
        axes.set_ylabel("nats per token")
    return figure


def _value(run: ComparedRun, key: str) -> float:
    value = run.settings[key]
    assert isinstance(value, int | float)
    return value


def _line(runs: Sequence[ComparedRun], key: str, loss_of: Callable[[ComparedRun], float | None]) -> Line:
    losses = [(_value(run, key), loss_of(run)) for run in runs]
    return [(value, loss) for value, loss in losses if loss is not None and math.isfinite(loss)]


def _loss(run: ComparedRun, source: str) -> float | None:
    if source == MEAN:
        return run.mean_loss
    return run.sources[source].loss if run.sources[source].comparable else None


def _baseline_loss(run: ComparedRun, source: str) -> float | None:
    """Loss of the run's baseline, if that is finished too."""
    loss, baseline = _loss(run, source), run.baseline
    if loss is None or baseline is None or baseline.tokens != run.measured_tokens:
        return None
    gap = fmean(baseline.source_gaps.values()) if source == MEAN else baseline.source_gaps[source]
    return loss - gap


def _span(lines: Sequence[Line]) -> float:
    """Height of every panel in nats, so that slopes are comparable between panels."""
    spans = [max(losses) - min(losses) for line in lines if (losses := [loss for _, loss in line])]
    return 1.6 * max(spans) or 0.01


def _draw(axes: Axes, line: Line, span: float, colour: str, dashes: str) -> None:
    axes.set_visible(True)
    losses = [loss for _, loss in line]
    means = by_value(line)
    axes.plot(*zip(*means, strict=True), dashes, color=colour, linewidth=1.8)
    axes.plot(*zip(*line, strict=True), "o", color=colour, markersize=4)
    for value, loss in means:
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


@dataclass(frozen=True)
class ComparisonFigure:
    name: str
    title: str
    caption: Callable[[Comparison], str]
    applies: Callable[[Comparison], bool]
    draw: Callable[[Comparison, Theme], Figure]


def figures_of(comparison: Comparison) -> list[ComparisonFigure]:
    return [figure for figure in FIGURES if figure.applies(comparison)]


def _setting_caption(comparison: Comparison) -> str:
    key = comparison.swept_setting or ""
    runs = series_of(comparison)
    means = by_value(plain_means(runs, key))
    caption = f"Losses of the finished runs over {key}, all on the same scale; lower is better. "
    if len(means) > 1:
        value, lowest = min(means, key=itemgetter(1))
        caption += f"The unweighted mean is lowest, {lowest:.3f}, at {value:g}. "
    if any(run.baseline is not None for run in runs):
        caption += "Dashed: the dense baseline of each run. "
    if repeats(runs, key):
        return caption + "Points are runs; lines connect the means over training.seed."
    return caption + "Points are single runs, so the variation between training seeds is unknown."


def _loss_caption(comparison: Comparison) -> str:
    what = (
        "Mean of the sources' losses by token share."
        if comparison.losses_comparable
        else "One panel per source, since the runs' means are not comparable; a run is missing where it was not evaluated on "
        "the sequences of the others."
    )
    dashed = any(run.baseline is not None or run.is_dense for run in comparison.runs)
    return what + (" Dashed: dense." if dashed else " There is no dense baseline.")


FIGURES = (
    ComparisonFigure(
        "setting",
        "Effect of the setting",
        _setting_caption,
        has_series,
        draw_setting,
    ),
    ComparisonFigure("loss", "Validation loss", _loss_caption, has_loss, draw_loss),
    ComparisonFigure(
        "zeros",
        "Exact zeros",
        lambda comparison: (
            "Share of exact zeros among the products of gate and up, over all layers, without dense runs."
        ),
        lambda comparison: any(point.zeros for run in comparison.runs if not run.is_dense for point in run.points),
        draw_zeros,
    ),
)
