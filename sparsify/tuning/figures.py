"""The pictures that argue for a mixture, or against choosing one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.themes import Theme
from sparsify.tuning.record import WEIGHTED, Curve, TuneRecord

MOST_COLUMNS = 6
MOST_ROWS = 8
COLUMNS_OF_ONE_CURVE = 3

Draw = Callable[[TuneRecord, Theme], Figure]


def loss_against_share(record: TuneRecord, theme: Theme) -> Figure:
    """Predicted loss of every domain against every varied share, with its band and the trials."""
    names = shown_domains(record)
    curves = record.curves[:MOST_COLUMNS]
    if len(curves) == 1:
        figure, panels = _wrapped(len(names))
    else:
        figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 1.45 * len(names)))
        grid = figure.subplots(len(names), len(curves), sharex="col", sharey="row", squeeze=False)
        panels = list(grid.flat)
    pairs = [(name, curve) for name in names for curve in curves]
    for axes, (name, curve) in zip(panels, pairs, strict=True):
        _panel(axes, record, curve, name, theme)
        axes.set_ylim(_loss_range(curves, name))
        first_column, last_row = curve is curves[0], name == names[-1] or len(curves) == 1
        if first_column:
            axes.set_title(_title(name), fontsize=9)
        if last_row:
            axes.set_xlabel(f"share of {curve.part}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8.5)
    return figure


def shown_domains(record: TuneRecord) -> list[str]:
    """The weighted loss and the domains of most weight, as many as a picture can hold."""
    by_weight = sorted(record.domains, key=lambda name: -record.domains[name].weight)
    kept = by_weight[: MOST_ROWS - 1]
    return [WEIGHTED, *(name for name in record.domains if name in kept)]


def _wrapped(num_panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS_OF_ONE_CURVE, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 2.3 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.remove()
    return figure, panels[:num_panels]


def _title(name: str) -> str:
    return "weighted loss, nats per token" if name == WEIGHTED else name


def _panel(axes: Axes, record: TuneRecord, curve: Curve, name: str, theme: Theme) -> None:
    part = record.parts.index(curve.part)
    shares, losses = np.array(curve.shares), np.array(curve.losses[name])
    half, at = np.array(curve.half_widths[name]), [one.part_shares[part] for one in record.trials]
    colour = theme.product if name == WEIGHTED else theme.control
    fill = theme.product_fill if name == WEIGHTED else theme.line
    axes.fill_between(shares, losses - half, losses + half, color=fill, lw=0, label="90% band")
    axes.plot(shares, losses, color=colour, linewidth=1.8, label="regression")
    observed = curve.trial_losses[name]
    axes.plot(at[1:], observed[1:], "o", color=theme.ink, markersize=3.6, label="trial")
    axes.plot(
        at[:1],
        observed[:1],
        "s",
        color=theme.gate,
        markersize=5.5,
        label="default mixture",
    )
    tuned = record.tuned_part_shares[part]
    label = "tuned mixture" if record.reason is None else "predicted best, not supported"
    axes.axvline(tuned, color=theme.up, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _loss_range(curves: Sequence[Curve], name: str) -> tuple[float, float]:
    """Range of all lines and trials of a row: a band may reach far beyond what was seen."""
    values = [value for one in curves for value in one.losses[name] + one.trial_losses[name]]
    margin = 0.2 * ((max(values) - min(values)) or 1e-3)
    return min(values) - margin, max(values) + margin


def observed_against_predicted(record: TuneRecord, theme: Theme) -> Figure:
    """Every trial's loss against what the regression predicts for it from all other trials."""
    names = shown_domains(record)
    figure, panels = _wrapped(len(names))
    for axes, name in zip(panels, names, strict=True):
        if name == WEIGHTED:
            pairs = [(one.left_out_weighted_loss, one.weighted_loss) for one in record.trials]
            quality = record.weighted.left_out_r2
        else:
            pairs = [(one.left_out_losses[name], one.losses[name]) for one in record.trials]
            quality = record.domains[name].left_out_r2
        predicted, observed = zip(*pairs, strict=True)
        low, high = min(predicted + observed), max(predicted + observed)
        margin = 0.08 * ((high - low) or 1e-3)
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=theme.line, linewidth=1.2, zorder=0)
        axes.plot(predicted[1:], observed[1:], "o", color=theme.ink, markersize=4)
        axes.plot(predicted[:1], observed[:1], "s", color=theme.gate, markersize=6)
        axes.set(xlim=ends, ylim=ends, xlabel="predicted, left out", ylabel="observed")
        axes.set_title(f"{_title(name).partition(',')[0]}: R² {quality:.2f}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(axis="x")
    return figure
