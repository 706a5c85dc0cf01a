"""Speed-up against sparsity, with the line that bytes allow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots
from matplotlib.ticker import PercentFormatter

from sparsify.benchmarks.decode_result import DecodeBench, FfnPoint, formats
from sparsify.errors import RunError
from sparsify.files import write_bytes
from sparsify.sparsity.pictures import WIDTH_INCHES, image
from sparsify.sparsity.themes import LIGHT, Theme

FORMATS = (".png", ".svg")


def check_figure(path: Path, sparsities: Sequence[float]) -> None:
    """Refuses a picture that cannot be drawn, before anything is measured.

    Raises:
        RunError: If its name is no picture's, or nothing is measured that it could show.
    """
    if path.suffix not in FORMATS:
        raise RunError(f"{path} is no picture.", allowed=f"A name in {' or '.join(FORMATS)}.")
    if not sparsities:
        raise RunError("--plot draws blocks over --sparsity, which is empty.")


def write_figure(bench: DecodeBench, path: Path) -> None:
    """Writes the picture as PNG or SVG.

    Raises:
        StorageError: If the disk refuses.
    """
    kind = "svg" if path.suffix == ".svg" else "png"
    write_bytes(path, image(partial(draw, bench), "decoding", LIGHT, kind))


def draw(bench: DecodeBench, theme: Theme) -> Figure:
    """One line for each way to decode, dashed where bytes would allow it to be."""
    figure, axes = subplots(figsize=(WIDTH_INCHES, 0.5 * WIDTH_INCHES))
    axes = cast(Axes, axes)
    single = [one for one in bench.ffn if one.tokens == 1 and one.threads == bench.threads]
    decides = [one for one in single if one.gate_share == one.active_share]
    independent = [one for one in single if one.gate_share != one.active_share]
    lines = [
        ("predictor", "predictor", decides, theme.product),
        ("exact, the gate decides", "exact", decides, theme.gate),
        ("exact, gate and up independent", "exact", independent, theme.up),
    ]
    for label, contender, points, colour in lines:
        _line(axes, label, contender, sorted(points, key=lambda p: -p.active_share), colour)
    axes.axhline(1.0, color=theme.ink, linewidth=0.8)
    axes.set_title(
        f"Decoding one block of {bench.hidden}×{bench.neurons} in {formats(bench.dtype, bench.weights)}, batch 1"
    )
    axes.set_xlabel("zeros among the activations")
    axes.set_ylabel("times as fast as our dense kernel")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.plot([], [], color=theme.ink, linestyle=(0, (4, 3)), label="what bytes allow")
    axes.legend(frameon=False)
    return figure


def _line(axes: Axes, label: str, contender: str, points: list[FfnPoint], colour: str) -> None:
    zeros = [1 - one.active_share for one in points]
    ratios = [one.ratio(contender, "dense") for one in points]
    middles = [one.median for one in ratios]
    spread = [
        [one.median - one.low for one in ratios],
        [one.high - one.median for one in ratios],
    ]
    axes.errorbar(zeros, middles, yerr=spread, color=colour, marker="o", capsize=2, label=label)
    axes.plot(zeros, [one.ideal(contender) for one in points], color=colour, linestyle=(0, (4, 3)))
