"""Pictures of how sparse a model could be: loss and error against the share of activations that is left out."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.schema import Curves, SharePoint, SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.sparsity.themes import Theme

MAX_RISE = 1.0
"""A perplexity that has doubled says all that a reader wants to know; what lies beyond would flatten the rest."""


def draw_cett(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    """Sparsity at every target error: the layers together, and each of them as a thin line."""
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
        axes.plot(*against, "s--", color=theme.control, label=report.against.model, markersize=5)
    axes.set(xlabel="CETT: error of the block's output", ylabel="neurons left out", ylim=(None, 1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


def draw_perplexity(
    report: SparsityReport, statistics: ActivationStatistics, theme: Theme
) -> Figure:
    """Rise of the perplexity when activations are left out by each of three rules."""
    curves, other = _curves(report), report.against.curves if report.against else None
    figure = Figure(figsize=(WIDTH_INCHES, 4.2))
    panels = figure.subplots(1, 2 if other else 1, sharex=True, sharey=True, squeeze=False)[0]
    panels[0].set_title(report.model)
    _draw_rules(panels[0], curves, theme)
    if report.against and other:
        panels[1].set_title(report.against.model)
        _draw_rules(panels[1], other, theme)
    panels[0].set_ylabel("rise of the perplexity")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def _draw_rules(axes: Axes, curves: Curves, theme: Theme) -> None:
    cett = [(point.edited_sparsity, point.loss) for point in curves.cett]
    rules = (
        ("thresholds at equal CETT", cett, theme.product, "o-"),
        ("top-k |h| of every token", _points(curves.top_k), theme.gate, "s--"),
        ("threshold on |h| of every layer", _points(curves.magnitude), theme.up, "^:"),
    )
    highest = 0.02
    for label, points, colour, dashes in rules:
        sparsity, loss = np.array(sorted(points)).T
        rise = np.expm1(np.clip(loss - curves.loss, -50, 50))
        axes.plot(sparsity, rise, dashes, color=colour, label=label, markersize=5)
        highest = max(highest, float(np.nanmax(rise)))
    for point in curves.ppl:
        axes.axhline(point.percent / 100, color=theme.line, linewidth=0.9, zorder=0)
    axes.set(
        xlabel="zeros among the products", ylim=(-0.03 * highest, min(highest, MAX_RISE) * 1.06)
    )
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(visible=False)


def _points(points: list[SharePoint]) -> list[tuple[float, float]]:
    return [(point.sparsity, point.loss) for point in points if not math.isnan(point.loss)]


def _curves(report: SparsityReport) -> Curves:
    assert report.curves is not None
    return report.curves
