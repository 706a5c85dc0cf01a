"""Figures of one measured model: zeros by layer, expert, neuron, source and position, and what an engine can exploit."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator, PercentFormatter

from sparsify.models.masking import COUNTED_SITES
from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import WIDTH_INCHES, Theme
from sparsify.sparsity.measure import sorted_firing_rates
from sparsify.sparsity.schema import LayerRow, SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics

MAX_LABELLED_CELLS = 320
"""A heat map with at most this many cells has a number in each cell."""
MAX_CURVE_POINTS = 300
"""Points of a firing-rate curve; more would be invisible and make the file larger."""


def draw_layers(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    rows = report.layer_rows
    layers = np.array([row.layer for row in rows])
    product, low, high = (shares(rows, name) for name in ("product_zeros", "p5", "p95"))
    figure = Figure(figsize=(WIDTH_INCHES, 3.9))
    axes = figure.add_subplot()
    axes.bar(layers, product, width=0.74, color=theme.product_fill)
    tops = axes.hlines(product, layers - 0.37, layers + 0.37, color=theme.product, linewidth=2.4)
    # The mean may be outside p5 to p95 if a few tokens are very different, so the whisker is not an error bar.
    whiskers = axes.vlines(layers, low, high, color=theme.ink, linewidth=1)
    gate, up = (
        axes.plot(layers + shift, shares(rows, name), marker, color=colour, markersize=5)[0]
        for shift, name, marker, colour in (
            (-0.15, "gate_zeros", "o", theme.gate),
            (0.15, "up_zeros", "D", theme.up),
        )
    )
    axes.set(xlabel="layer", ylim=(0, 1), xlim=(layers[0] - 0.7, layers[-1] + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(
        [tops, whiskers, gate, up],
        ["product (inactive neurons)", "p5 to p95 over tokens", "gate factor", "up factor"],
        loc="outside upper left",
        ncols=4,
        columnspacing=1.8,
    )
    return figure


def draw_masked_inputs(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    layers = [row.layer for row in report.layer_rows]
    figure = Figure(figsize=(WIDTH_INCHES, 3.2))
    axes = figure.add_subplot()
    colours = (theme.gate, theme.product, theme.up)
    for number, site in enumerate(site for site in COUNTED_SITES if site in report.site_zeros):
        zeros = [row.site_zeros[site] for row in report.layer_rows]
        style = ("o-", "s--", "D:", "^-", "v--", "x:", "+-")[number]
        axes.plot(layers, zeros, style, color=colours[number % 3], label=site, markersize=5, clip_on=False)
    axes.set(xlabel="layer", ylim=(0, 1), xlim=(layers[0] - 0.7, layers[-1] + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def draw_routers(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.add_subplot()
    bins = len(report.routers[0].gates)
    centres = (np.arange(bins) + 0.5) / bins
    for row in report.routers:
        axes.plot(centres, row.gates, color=theme.line, linewidth=1)
    axes.plot(
        centres, np.mean([row.gates for row in report.routers], axis=0), "o-", color=theme.product, markersize=4.5
    )
    axes.set(xlabel="sigmoid of a group's score", ylabel="share of groups", xlim=(0, 1), ylim=(0, None))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def draw_experts(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    num_layers = len(report.layer_rows)
    zeros = shares(report.expert_rows, "product_zeros").reshape(num_layers, -1).T
    tokens = np.array([row.num_tokens for row in report.expert_rows], dtype=float)
    tokens = tokens.reshape(num_layers, -1).T
    load = tokens / tokens.sum(axis=0)
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.56 * report.num_experts))
    upper, lower = figure.subplots(2, 1, sharex=True)
    heat_map(figure, upper, zeros, theme, "zeros among the products")
    heat_map(figure, lower, load, theme, "load: share of the layer's routed tokens")
    lower.set_xlabel("layer")
    return figure


def draw_hidden_routing(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    routing = report.hidden_routing
    assert routing is not None
    figure = Figure(figsize=(WIDTH_INCHES, 1.5 + 0.4 * (routing.sub_dimensions - routing.shared)))
    both = figure.subplots(2, 1, sharex=True)
    for axes, block, words in zip(both, ("attention", "ffn"), ("attention", "feed-forward block"), strict=True):
        loads = np.array([row.load for row in routing.rows if row.block == block]).T
        heat_map(figure, axes, loads, theme, f"{words}: share of the router's choices", "sub-dimension")
        axes.set_yticks(range(len(loads)), [str(routing.shared + number) for number in range(len(loads))])
    both[-1].set_xlabel("layer")
    return figure


def draw_firing_rates(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, 3.9))
    axes = figure.add_subplot()
    curves = sorted_firing_rates(statistics)
    at = np.unique(np.linspace(0, curves.shape[1] - 1, MAX_CURVE_POINTS).astype(int))
    neuron_share = (at + 1) / curves.shape[1]
    # The logarithm of a dead neuron's rate is undefined: the line ends there.
    rates = np.where(curves[:, at] > 0, curves[:, at], np.nan)
    colours = theme.heat(np.linspace(0.35, 1, len(rates)))
    for layer, (rate, colour) in enumerate(zip(rates, colours, strict=True)):
        ends = layer in (0, len(rates) - 1)
        label = f"layer {layer}" if ends else None
        axes.plot(neuron_share, rate, color=colour, linewidth=2 if ends else 1, label=label)
    axes.set_yscale("log")
    axes.set(xlabel="neurons of a layer, hottest first", ylabel="fires on this share of tokens")
    axes.set_xlim(0, 1)
    axes.set_ylim(top=1.3)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate * 100:g}%"))
    axes.grid(axis="x")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def shares(rows: list[LayerRow], name: str) -> np.ndarray:
    """One column of some rows; NaN where the value is None."""
    values = (getattr(row, name) for row in rows)
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def heat_map(figure: Figure, axes: Axes, values: np.ndarray, theme: Theme, title: str, rows: str = "expert") -> None:
    """Draws shares [experts, layers]; experts without tokens are blank. `rows` says what rows are, if not experts."""
    low, high = heat_range(values)
    image = axes.imshow(values, cmap=theme.heat, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=0), pad=0.015, fraction=0.05)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    axes.set_title(title)
    axes.set_ylabel(rows)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    if values.size <= MAX_LABELLED_CELLS:
        _label_cells(axes, values, theme)


def heat_range(values: np.ndarray) -> tuple[float, float]:
    """Limits of a colour scale for shares, at least one percentage point apart so that near-equal shares look equal."""
    low = float(np.nanmin(values))
    return low, max(float(np.nanmax(values)), low + 0.01)


def _label_cells(axes: Axes, values: np.ndarray, theme: Theme) -> None:
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        # High values contrast with the surface colour, so their labels have the surface colour.
        ink = theme.surface if value > middle else theme.ink
        label = "–" if math.isnan(value) else f"{value * 100:.0f}"
        axes.text(column, row, label, color=ink, ha="center", va="center", size=8)


def draw_causes(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    rows = report.layer_rows
    layers = np.array([row.layer for row in rows])
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.add_subplot()
    bottom = np.zeros(len(rows))
    for name, label, colour in (
        ("both_zeros", "both factors zero", theme.product),
        ("gate_only_zeros", "gate only", theme.gate),
        ("up_only_zeros", "up only", theme.up),
        ("underflow_zeros", "neither (underflow, threshold)", theme.baseline),
    ):
        values = shares(rows, name)
        if np.nansum(values) > 0:
            axes.bar(layers, values, bottom=bottom, width=0.74, color=colour, label=label)
            bottom += np.nan_to_num(values)
    axes.set(xlabel="layer", ylim=(0, 1), xlim=(layers[0] - 0.7, layers[-1] + 0.7))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=17, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def draw_sources(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    rows = np.arange(len(report.sources))[::-1]
    figure = Figure(figsize=(WIDTH_INCHES, 0.9 + 0.42 * len(rows)))
    axes = figure.add_subplot()
    for row, source in zip(rows, report.sources, strict=True):
        layers = [share for share in source.layers if not math.isnan(share)]
        axes.hlines(row, min(layers), max(layers), color=theme.product_fill, linewidth=5)
        axes.plot(source.product_zeros, row, "o", color=theme.product, markersize=8)
        axes.annotate(
            f"{percent(source.product_zeros)} of {source.num_tokens:,} tokens",
            (1.01, row),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            color=theme.muted,
        )
    axes.set_yticks(rows, [source.source for source in report.sources])
    axes.tick_params(axis="y", labelcolor=theme.ink)
    axes.set(xlabel="zeros among the products", ylim=(-0.6, len(rows) - 0.4))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(visible=False)
    axes.grid(axis="x")
    return figure


def draw_positions(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    rows = report.positions
    at = np.arange(len(rows))
    figure = Figure(figsize=(WIDTH_INCHES, 2.9))
    axes = figure.add_subplot()
    zeros = [row.product_zeros for row in rows]
    axes.plot(at, zeros, "o-", color=theme.product, linewidth=1.8, markersize=5)
    names = [
        str(row.first) if row.last == row.first else f"{row.first}+" if row.last is None else f"{row.first}–{row.last}"
        for row in rows
    ]
    axes.set_xticks(at, names)
    axes.set(xlabel="position in the document", ylabel="zeros among the products")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(y=0.25)
    return figure


def draw_unions(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    chunks = report.engine.chunks
    tokens = np.array([chunk.num_tokens for chunk in chunks])
    figure = Figure(figsize=(WIDTH_INCHES, 3.6))
    axes = figure.add_subplot()
    for name, label, colour, dashes, side in (
        ("unrelated", "unrelated tokens (a batch)", theme.gate, "s--", 1),
        ("consecutive", "consecutive tokens (a chunk)", theme.product, "o-", -1),
    ):
        values = np.array([getattr(chunk, name) for chunk in chunks], dtype=float)
        if not np.isnan(values).all():
            axes.plot(tokens, values, dashes, color=colour, label=label, markersize=5)
            last = np.flatnonzero(~np.isnan(values))[-1]
            axes.annotate(
                percent(float(values[last])),
                (tokens[last], values[last]),
                (7, 3 * side),
                textcoords="offset points",
                color=colour,
                va="bottom" if side > 0 else "top",
                annotation_clip=False,
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [str(number) for number in tokens])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="number of tokens", ylim=(0, 1.06), ylabel="share of neurons that fire")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2)
    return figure
