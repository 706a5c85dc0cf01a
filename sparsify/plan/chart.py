"""The mixture of a run as an area chart of each source's share of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots
from matplotlib.ticker import PercentFormatter

from sparsify.errors import StorageError
from sparsify.files import write_bytes
from sparsify.plan.estimate import Plan
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image

FORMATS = (".png", ".svg")
LABEL_SPACING = 0.043
"""Minimum distance between two labels, as a share of the chart's height."""


def check_chart_path(path: Path) -> None:
    """Raises StorageError for a suffix that no chart has."""
    if path.suffix not in FORMATS:
        raise StorageError(
            f"{path} is not a picture.",
            allowed=f"A name that ends in {' or '.join(FORMATS)}.",
            next_step=f"For example: --chart {path.stem or 'shares'}.png",
        )


def write_chart(plan: Plan, path: Path) -> None:
    check_chart_path(path)
    kind = "svg" if path.suffix == ".svg" else "png"
    write_bytes(path, image(partial(draw_shares, plan), "mixture", LIGHT, kind))


def draw_shares(plan: Plan, theme: Theme) -> Figure:
    """Shares of tokens over the run, the instruction sources on top of the pretraining sources."""
    names = sorted(plan.sources, key=lambda name: plan.sources[name].group, reverse=True)
    groups = [plan.sources[name].group for name in names]
    figure, axes = subplots(figsize=(WIDTH_INCHES, 0.42 * WIDTH_INCHES))
    axes = cast(Axes, axes)
    tokens, shares = _corners(plan, names)
    areas = axes.stackplot(tokens, shares, colors=_colours(groups, theme), edgecolor=theme.surface, linewidth=0.6)
    for phase in plan.phases[:-1]:
        axes.axvline(phase.until_tokens, color=theme.ink, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_title(f"Shares of training tokens in {plan.recipe}")
    axes.set_xlim(0, plan.num_tokens)
    axes.set_ylim(0, 1)
    axes.set_xlabel("training tokens")
    axes.xaxis.set_major_formatter(_tokens)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(False)
    colours = [area.get_facecolor()[0] for area in areas]
    _label(axes, plan, names, [series[-1] for series in shares], colours)
    return figure


def _corners(plan: Plan, names: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """Points of the piecewise linear shares: tokens, and for each source its share at each of them."""
    tokens, start = [], 0
    shares: list[list[float]] = [[] for _ in names]
    for phase in plan.phases:
        tokens += [start, phase.until_tokens]
        for series, name in zip(shares, names, strict=True):
            series += [phase.first[name], phase.last[name]]
        start = phase.until_tokens
    return tokens, shares


def _colours(groups: Sequence[str], theme: Theme) -> list[tuple[float, float, float, float]]:
    """One colour per source: shades of one colour within a group."""
    tones = {
        "pretraining": LinearSegmentedColormap.from_list("", theme.heat_stops[1:4]),
        "instruction": LinearSegmentedColormap.from_list("", (theme.gate, theme.up)),
    }
    colours = []
    for place, group in enumerate(groups):
        of_group = [number for number, other in enumerate(groups) if other == group]
        shade = of_group.index(place) / max(len(of_group) - 1, 1)
        colours.append(tones[group](1 - shade if group == "pretraining" else shade))
    return colours


def _label(axes: Axes, plan: Plan, names: Sequence[str], final: Sequence[float], colours: Sequence[Any]) -> None:
    """Names every source at the right edge, with its share at the beginning and at the end."""
    middles, top = [], 0.0
    for share in final:
        middles.append(top + share / 2)
        top += share
    for name, middle, height, colour in zip(names, middles, _spread(middles), colours, strict=True):
        first, last = plan.phases[0].first[name], plan.phases[-1].last[name]
        moves = any((one.first[name], one.last[name]) != (first, first) for one in plan.phases)
        text = f"{_percent(first)} → {_percent(last)}" if moves else _percent(first)
        axes.plot(
            (1.0, 1.03),
            (middle, height),
            transform=axes.transAxes,
            color=colour,
            linewidth=1.4,
            clip_on=False,
        )
        axes.text(1.037, height, f"{name}  {text}", transform=axes.transAxes, va="center", fontsize=8)


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.01 or share == 0 else f"{share:.2%}"


def _tokens(count: float, _place: float = 0) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:g}{unit}"
    return f"{count:g}"


def _spread(middles: Sequence[float]) -> list[float]:
    """Label heights near the given ascending ones, at least LABEL_SPACING apart; many labels are centred on the chart."""
    heights: list[float] = []
    for middle in middles:
        heights.append(max(middle, heights[-1] + LABEL_SPACING) if heights else middle)
    ceiling = max(1.0, 0.5 + LABEL_SPACING * (len(heights) - 1) / 2)
    for place in range(len(heights) - 1, -1, -1):
        heights[place] = min(heights[place], ceiling)
        ceiling = heights[place] - LABEL_SPACING
    return heights
