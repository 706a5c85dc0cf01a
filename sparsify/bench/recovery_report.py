"""The result of `sparsify bench recovery` as table, figures and files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.bench.recovery import DENSE, Recovery, RecoveryVariant
from sparsify.files import write_text
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image
from sparsify.reporting.tables import Table

PANEL_INCHES = 4.4
MARKERS = "osD^vP*X<>hp"
COLUMNS = ("variant", "rate", "loss", "to dense", "zeros", "gate's own", "gate first", "predictor")
PICTURES: dict[str, tuple[str, str]] = {
    "zeros": ("exact zeros", "zeros"),
    "gate_first": ("FFN bytes, exact gate-first kernel", "gate_first_bytes"),
    "predictor": ("FFN bytes, perfect predictor", "predicted_bytes"),
}
"""File name to the label of the x axis and the field on it; the figure of gap against tokens is separate."""


def recovery_table(recovery: Recovery) -> RenderableType:
    seeds = ", ".join(map(str, recovery.seeds))
    variants = sorted(recovery.variants, key=lambda variant: (variant.name != DENSE, variant.gap))
    title = f"After {recovery.budget_tokens:,} tokens, mean of seeds {seeds}"
    table = Table(title, COLUMNS, [_row(variant) for variant in variants])
    return Group("", table, Text(_notes(recovery)))


def _row(variant: RecoveryVariant) -> list[str]:
    gap, spread = f"{variant.gap:+.3f}", max(variant.gaps) - min(variant.gaps)
    if len(variant.gaps) > 1:
        gap += f" ± {spread / 2:.3f}"
    shares = ("zeros", "gate_zeros", "gate_first_bytes", "predicted_bytes")
    return [
        variant.name,
        f"{variant.peak_learning_rate:g}{'*' if variant.at_edge() else ''}",
        f"{variant.mean('loss'):.3f}",
        "–" if variant.name == DENSE else gap,
        *(f"{variant.mean(share):.1%}" for share in shares),
    ]


def _notes(recovery: Recovery) -> str:
    notes = [
        "gate first, predictor: share of the feed-forward weights read for one token, with an exact gate-first kernel and with a "
        "perfect predictor of no cost.",
    ]
    if len(recovery.seeds) > 1:
        notes.append("±: half of the range over seeds.")
    if any(variant.at_edge() for variant in recovery.variants):
        notes.append("*: the lowest or highest rate tried; a better one may be outside the range (--rates).")
    return "\n".join(notes)


def write_recovery(recovery: Recovery, folder: Path) -> None:
    write_text(folder / "recovery.json", recovery.model_dump_json(indent=1) + "\n")
    draws: dict[str, Callable[[Theme], Figure]] = {"tokens": partial(_draw_tokens, recovery)}
    for name, (label, figure) in PICTURES.items():
        draws[name] = partial(_draw_end, recovery, label, figure)
    for name, draw in draws.items():
        (folder / f"{name}.png").write_bytes(image(draw, name, LIGHT, "png"))


def _draw_tokens(recovery: Recovery, theme: Theme) -> Figure:
    """Gap to the dense baseline against tokens, mean over seeds; dotted during activation blending."""
    figure, axes = _figure()
    dense = {run.seed: {point.tokens: point.loss for point in run.points} for run in recovery.dense.runs}
    for index, variant in enumerate(_sparse(recovery)):
        columns = zip(*(run.points for run in variant.runs), strict=True)
        baselines = [dense[run.seed] for run in variant.runs]
        rows = [
            (
                points[0].tokens,
                sum(point.loss - of_seed[point.tokens] for point, of_seed in zip(points, baselines, strict=True))
                / len(points),
                points[0].blended_share == 1,
            )
            for points in columns
        ]
        style = {"color": _colour(index), "marker": MARKERS[index % len(MARKERS)], "markersize": 5}
        whole = [row for row in rows if row[2]]
        axes.plot([row[0] for row in rows], [row[1] for row in rows], ":", color=_colour(index))
        axes.plot([row[0] for row in whole], [row[1] for row in whole], label=variant.name, **style)
    axes.axhline(0, color=theme.baseline, linewidth=1)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set(xlabel="training tokens", ylabel="loss gap to the dense baseline, nats")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _draw_end(recovery: Recovery, label: str, share: str, theme: Theme) -> Figure:
    """Final gap to the dense baseline against one share; one point per seed."""
    figure, axes = _figure()
    for index, variant in enumerate(_sparse(recovery)):
        values = [getattr(run.last, share) for run in variant.runs]
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(values, variant.gaps, marker, color=_colour(index), label=variant.name, markersize=7)
    axes.axhline(0, color=theme.baseline, linewidth=1)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel=label, ylabel="loss gap to the dense baseline, nats")
    figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure


def _sparse(recovery: Recovery) -> list[RecoveryVariant]:
    """Sparse variants in order of descending gap, so that the legend has the order of the curves' ends."""
    sparse = [variant for variant in recovery.variants if variant.name != DENSE]
    return sorted(sparse, key=lambda variant: -variant.gap)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES), layout="constrained")
    return figure, figure.subplots()


def _colour(index: int) -> tuple[float, float, float, float]:
    """Ten strong colours, then their ten pale counterparts."""
    return colormaps["tab20"]((2 * index + index // 10) % 20)
