"""Figures of a model's stages and training, and of loss and error against the share of dropped activations."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter, PercentFormatter

from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import WIDTH_INCHES, Theme
from sparsify.runs.history import Trajectory, TrajectoryPoint
from sparsify.sparsity.figures_model import heat_range
from sparsify.sparsity.schema import Curves, SharePoint, SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics

Measure = Literal["loss", "zeros"]


def draw_stages(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    stages = report.stages
    rows = np.arange(len(stages))[::-1]
    losses = np.array([stage.loss for stage in stages])
    figure = Figure(figsize=(WIDTH_INCHES, 1.0 + 0.46 * len(stages)))
    axes = figure.add_subplot()
    axes.hlines(rows, 0, 1, color=theme.line, linewidth=0.8, transform=axes.get_yaxis_transform())
    finite = losses[np.isfinite(losses)]
    margin = 0.12 * (np.ptp(finite) or 1.0) if len(finite) else 1.0
    for row, stage in zip(rows, stages, strict=True):
        colour = theme.baseline if not stage.zeros else theme.product
        axes.plot(stage.loss, row, "o", color=colour, markersize=9)
        axes.annotate(f"{stage.loss:.3f}", (stage.loss, row), (0, 9), textcoords="offset points", ha="center")
        if stage.zeros is not None:
            axes.annotate(
                f"{percent(stage.zeros)} zeros",
                (1.01, row),
                xycoords=axes.get_yaxis_transform(),
                va="center",
                color=theme.muted,
            )
    axes.set_yticks(rows, [stage.name for stage in stages])
    axes.tick_params(axis="y", labelcolor=theme.ink, labelsize=9.5)
    axes.set(xlabel="loss, nats per token", ylim=(-0.6, len(stages) - 0.25))
    if len(finite):
        axes.set_xlim(finite.min() - margin, finite.max() + margin)
    axes.grid(visible=False)
    return figure


def draw_trajectory(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    trajectory = _trajectory(report)
    figure = Figure(figsize=(WIDTH_INCHES, 5.0))
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    panels: dict[Measure, Axes] = {"loss": upper, "zeros": lower}
    for measure, axes in panels.items():
        baseline, sparse = (_known(run, measure) for run in (trajectory.baseline, trajectory.sparse))
        above = not baseline or not sparse or sparse[-1][1] >= baseline[-1][1]
        _curve(axes, baseline, measure, theme.baseline, "dense baseline", "--", above=not above)
        _curve(axes, sparse, measure, theme.product, "sparse", "-", above=above)
        axes.grid(axis="x")
    upper.set_title("validation loss, nats per token")
    lower.set_title("zeros among the products")
    lower.yaxis.set_major_formatter(PercentFormatter(1))
    _token_axis(lower)
    handles, labels = upper.get_legend_handles_labels()
    upper.legend(handles[::-1], labels[::-1], loc="upper right")
    return figure


def draw_layers_over_time(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    points = layer_points(report)
    zeros = np.array([point.layers for point in points]).T
    low, high = heat_range(zeros)
    figure = Figure(figsize=(WIDTH_INCHES, 1.8 + min(3.2, 0.16 * len(zeros))))
    axes = figure.add_subplot()
    mesh = axes.pcolormesh(
        _edges(np.array([point.tokens for point in points], dtype=float)),
        np.arange(len(zeros) + 1) - 0.5,
        zeros,
        cmap=theme.heat,
        vmin=low,
        vmax=high,
        # Adjacent cells of a vector drawing show hairlines between them; a bitmap does not.
        rasterized=True,
    )
    bar = figure.colorbar(mesh, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    axes.set_ylabel("layer")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    _token_axis(axes)
    return figure


def draw_scaling(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    fit, sparse = report.scaling, _known(_trajectory(report).sparse, "zeros")
    assert fit is not None
    points = [(tokens, 1 - zeros) for tokens, zeros in sparse if tokens > 0]
    tokens = [point.tokens for point in fit.band]
    figure = Figure(figsize=(WIDTH_INCHES, 3.6))
    axes = figure.add_subplot()
    low, high = ([getattr(point, end) for point in fit.band] for end in ("low", "high"))
    label = f"{fit.confidence:.0%} band"
    axes.fill_between(tokens, low, high, color=theme.product_fill, alpha=0.5, lw=0, label=label)
    axes.plot(tokens, [point.active for point in fit.band], color=theme.product, label="law")
    axes.plot(*zip(*points, strict=True), "o", color=theme.gate, label="checkpoints")
    axes.axvline(points[-1][0], color=theme.line, linewidth=1)
    # The band may be much wider than the curve, so measured and predicted values set the limits.
    values = [value for _, value in points] + [point.active for point in fit.band]
    margin = 0.6 * (max(values) - min(values)) or 0.01
    axes.set(ylim=(max(0, min(values) - margin), min(1, max(values) + margin)))
    axes.set_ylabel("active neurons")
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _token_axis(axes)
    axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def layer_points(report: SparsityReport) -> list[TrajectoryPoint]:
    points = [point for point in _trajectory(report).sparse if point.layers]
    return sorted(points, key=lambda point: point.tokens)


def _trajectory(report: SparsityReport) -> Trajectory:
    return report.trajectory or Trajectory(sparse=[])


def _known(points: list[TrajectoryPoint], measure: Measure) -> list[tuple[int, float]]:
    return sorted((point.tokens, value) for point in points if (value := getattr(point, measure)) is not None)


def _curve(
    axes: Axes,
    points: list[tuple[int, float]],
    measure: Measure,
    colour: str,
    label: str,
    dashes: str,
    *,
    above: bool,
) -> None:
    if not points:
        return
    tokens, values = zip(*points, strict=True)
    axes.plot(tokens, values, dashes, color=colour, label=label, linewidth=1.8, marker=".", ms=5)
    axes.annotate(
        percent(values[-1]) if measure == "zeros" else f"{values[-1]:.3f}",
        points[-1],
        (6, 2 if above else -2),
        textcoords="offset points",
        color=colour,
        va="bottom" if above else "top",
        annotation_clip=False,
    )


def _token_axis(axes: Axes) -> None:
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))


def _edges(centres: np.ndarray) -> np.ndarray:
    middles = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[centres[0]], middles, [centres[-1]]])


MAX_RISE = 1.0
"""Upper limit of the axis: larger increases would flatten the rest of the curve."""


def draw_cett(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    """Sparsity against target error: the mean over layers, and each layer as a thin line."""
    curves = _curves(report)
    figure = Figure(figsize=(WIDTH_INCHES, 3.9))
    axes = figure.add_subplot()
    errors = [point.target for point in curves.cett]
    layers = np.array([[layer.sparsity for layer in point.layers] for point in curves.cett]).T
    for index, layer in enumerate(layers):
        label = "single layers" if index == 0 else None
        axes.plot(errors, layer, color=theme.product_fill, linewidth=1, label=label)
    sparsities = [point.sparsity for point in curves.cett]
    axes.plot(errors, sparsities, "o-", color=theme.product, label=report.model, markersize=5)
    other = report.against.curves if report.against else None
    if report.against and other:
        against = ([p.target for p in other.cett], [p.sparsity for p in other.cett])
        axes.plot(*against, "s--", color=theme.baseline, label=report.against.model, markersize=5)
    axes.set(xlabel="CETT: error of the block's output", ylabel="dropped neurons", ylim=(None, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_perplexity(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    """Increase of the perplexity when activations are dropped by each of three rules."""
    curves, other = _curves(report), report.against.curves if report.against else None
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    panels = figure.subplots(1, 2 if other else 1, sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_title(report.model)
    _draw_rules(panels[0], curves, theme)
    if report.against and other:
        panels[1].set_title(report.against.model)
        _draw_rules(panels[1], other, theme)
    panels[0].set_ylabel("increase of perplexity")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _draw_rules(axes: Axes, curves: Curves, theme: Theme) -> None:
    cett = [(point.edited_sparsity, point.loss) for point in curves.cett]
    rules = (
        ("thresholds at equal CETT", cett, theme.product, "o-"),
        ("top-k |h| per token", _points(curves.top_k), theme.gate, "s--"),
        ("threshold on |h| per layer", _points(curves.magnitude), theme.up, "^:"),
    )
    highest = 0.02
    for label, points, colour, dashes in rules:
        sparsity, loss = np.array(sorted(points)).T
        rise = np.expm1(np.clip(loss - curves.loss, -50, 50))
        axes.plot(sparsity, rise, dashes, color=colour, label=label, markersize=5)
        highest = max(highest, float(np.nanmax(rise)))
    for point in curves.ppl:
        axes.axhline(point.percent / 100, color=theme.line, linewidth=0.9, zorder=0)
    axes.set(xlabel="zeros among the products", ylim=(-0.03 * highest, min(highest, MAX_RISE) * 1.06))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False)


def _points(points: list[SharePoint]) -> list[tuple[float, float]]:
    return [(point.sparsity, point.loss) for point in points if not math.isnan(point.loss)]


def _curves(report: SparsityReport) -> Curves:
    assert report.curves is not None
    return report.curves
