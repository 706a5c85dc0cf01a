"""Pictures of what the zeros come from and of what an engine would feel."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

from sparsify.sparsity.block_figures import shares
from sparsify.sparsity.percent import percent
from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.schema import SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.sparsity.themes import Theme


def draw_causes(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    """Zeros of every layer, split by the factor that made them."""
    rows = report.layer_rows
    layers = np.array([row.layer for row in rows])
    figure = Figure(figsize=(WIDTH_INCHES, 3.4))
    axes = figure.add_subplot()
    bottom = np.zeros(len(rows))
    for name, label, colour in (
        ("both_zeros", "both factors zero", theme.product),
        ("gate_only_zeros", "gate only", theme.gate),
        ("up_only_zeros", "up only", theme.up),
        ("underflow_zeros", "neither (underflow, threshold)", theme.control),
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
    """Zeros of every source: all layers together as a dot, the layers' extent as a line."""
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


def draw_positions(
    report: SparsityReport, statistics: ActivationStatistics, theme: Theme
) -> Figure:
    """Zeros by position in the document."""
    rows = report.positions
    at = np.arange(len(rows))
    figure = Figure(figsize=(WIDTH_INCHES, 2.9))
    axes = figure.add_subplot()
    zeros = [row.product_zeros for row in rows]
    axes.plot(at, zeros, "o-", color=theme.product, linewidth=1.8, markersize=5)
    names = [
        str(row.first)
        if row.last == row.first
        else f"{row.first}+"
        if row.last is None
        else f"{row.first}–{row.last}"
        for row in rows
    ]
    axes.set_xticks(at, names)
    axes.set(xlabel="position in the document", ylabel="zeros among the products")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(y=0.25)
    return figure


def draw_unions(report: SparsityReport, statistics: ActivationStatistics, theme: Theme) -> Figure:
    """Neurons that several tokens need together, consecutive ones and unrelated ones."""
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
    axes.set(xlabel="tokens together", ylim=(0, 1.06), ylabel="share of neurons that fire")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(loc="outside upper left", ncols=2)
    return figure
