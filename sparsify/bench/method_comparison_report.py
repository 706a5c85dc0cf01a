"""The result of `sparsify bench methods` as table, figure and page."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.bench.method_comparison import REPEATS, RESULT_FILE, MethodPoint, MethodsBench
from sparsify.files import write_bytes, write_text
from sparsify.reporting.html import page_environment
from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image, page_figure
from sparsify.reporting.tables import Table

PANEL_INCHES = 4.8
MARKERS = "osD^vP*X<>hp"
PAGE_FILE = "methods.html"
FIGURE = "loss_against_weights_read"
LINEAR_NATS = 0.01
"""Below this the axis of losses is linear, as differences from the dense model may be 0 or negative."""
COLUMNS = (
    "density",
    "method",
    "loss over dense, nats",
    "reconstructed",
    "perplexity",
    "weights read",
    "zeros",
    "tokens/s, of dense",
)


def comparison_table(bench: MethodsBench) -> Table:
    """One row for each method and density: the densest first, of each the smallest loss first, what is impossible last."""
    table = Table(f"{bench.model}, {bench.text}", COLUMNS, left=(1, 6))
    densities = sorted({point.density for point in bench.points}, reverse=True)
    for density in densities:
        names = list(dict.fromkeys(point.method for point in bench.points if point.density == density))
        rows = [(bench.point(name, density, False), bench.point(name, density, True)) for name in names]
        for plain, refitted in sorted(rows, key=_rank):
            table.add(*_row(plain, refitted))
        table.add_rule()
    return table


def _rank(pair: tuple[MethodPoint | None, MethodPoint | None]) -> float:
    return min((one.difference.value for one in pair if one and one.difference), default=math.inf)


def _row(plain: MethodPoint | None, refitted: MethodPoint | None) -> list[str]:
    either = plain or refitted
    assert either is not None
    start = [f"{either.density:g}", either.method]
    if either.difference is None:
        return [*start, "impossible"]
    speed = either.decoding
    return [
        *start,
        _interval(plain),
        _interval(refitted),
        f"{math.exp(either.loss or 0.0):.2f}",
        percent(either.weight_density),
        _zeros(either.zeros),
        "–" if speed is None else f"{speed.tokens_per_second:.0f}, {speed.speed:.2f}×",
    ]


def _zeros(zeros: Mapping[str, float]) -> str:
    """Zeros by site; three or more sites with the same share are counted, not named."""
    sites: dict[str, list[str]] = {}
    for site, share in zeros.items():
        sites.setdefault(f"{share:.0%}", []).append(site)
    named = (f"{', '.join(of)} {share}" if len(of) < 3 else f"{len(of)} sites {share}" for share, of in sites.items())
    return ", ".join(named)


def _interval(point: MethodPoint | None) -> str:
    if point is None or point.difference is None:
        return "–"
    value, low = point.difference.value, point.difference.low
    return f"{value:+.3f}" if low is None else f"{value:+.3f} ± {value - low:.3f}"


def _notes(bench: MethodsBench) -> list[str]:
    notes = [
        f"Dense: {bench.dense_loss:.4f} nats per token, perplexity {math.exp(bench.dense_loss):.2f}, on {bench.num_tokens:,} "
        f"held-out tokens; all of them are masked. Calibrated on {bench.identity['calibration_tokens']:,} others.",
        f"±: 95% interval of the paired difference over {bench.num_sequences} sequences. Perplexity, weights read, zeros and speed are of "
        "the mask without reconstruction.",
        "density: wanted share of the weights of all linear projections that a token reads; weights read: the realised one.",
        f"tokens/s: with the kernels on {bench.device}{_threads(bench)}, median of {REPEATS} repeats interleaved with the dense "
        "model; – where they do not apply the mask, or it was not requested.",
    ]
    by_density = sorted(bench.points, key=lambda point: -point.density)
    impossible = {point.method: point.impossible for point in by_density if point.impossible}
    return [*notes, *impossible.values()]


def _threads(bench: MethodsBench) -> str:
    numbers = sorted({point.decoding.threads for point in bench.points if point.decoding})
    return f", {' or '.join(map(str, numbers))} thread(s)" if numbers else ""


def methods_table(bench: MethodsBench) -> RenderableType:
    return Group("", comparison_table(bench), Text("\n".join(_notes(bench)), "dim"))


def write_methods(bench: MethodsBench, folder: Path) -> None:
    """Writes methods.json, methods.html and the figure.

    Raises:
        StorageError: If the disk refuses.
    """
    draw, caption = (
        partial(_draw, bench),
        (
            "Difference of the held-out loss from the dense model's, with 95% intervals over sequences, against the share of the weights "
            "of all linear projections that a token reads. Dashed: reconstructed."
        ),
    )
    write_text(folder / RESULT_FILE, bench.model_dump_json(indent=1) + "\n")
    write_bytes(folder / f"{FIGURE}.png", image(draw, FIGURE, LIGHT, "png"))
    page = page_environment("sparsify.bench").get_template("method_comparison.html.j2")
    figures = [page_figure(draw, FIGURE, "Loss against weights read", caption)]
    command = " ".join(["sparsify", *sys.argv[1:]])
    text = page.render(
        bench=bench, table=comparison_table(bench), notes=_notes(bench), figures=figures, command=command
    )
    write_text(folder / PAGE_FILE, text)


def _draw(bench: MethodsBench, theme: Theme) -> Figure:
    figure = Figure(figsize=(WIDTH_INCHES, PANEL_INCHES), layout="constrained")
    axes = figure.subplots()
    for index, name in enumerate(dict.fromkeys(point.method for point in bench.points)):
        for refit in (False, True):
            found = [one for one in bench.points if (one.method, one.refit) == (name, refit) and one.difference]
            found.sort(key=lambda one: one.weight_density or 0.0)
            if not found:
                continue
            differences = [one.difference for one in found if one.difference]
            spans = [0.0 if one.low is None else one.value - one.low for one in differences]
            axes.errorbar(
                [one.weight_density or 0.0 for one in found],
                [one.value for one in differences],
                yerr=spans,
                label=None if refit else name,
                color=colormaps["tab20"]((2 * index + index // 10) % 20),
                marker=MARKERS[index % len(MARKERS)],
                linestyle="--" if refit else "-",
                markerfacecolor=theme.surface if refit else None,
                markersize=5,
                linewidth=1.3,
                capsize=2,
            )
    axes.axhline(0, color=theme.baseline, linewidth=1)
    if axes.dataLim.y1 > 10 * LINEAR_NATS:
        axes.set_yscale("symlog", linthresh=LINEAR_NATS)
        # Of the linear part only as much below 0 as there is.
        lows = [one.difference.low or 0.0 for one in bench.points if one.difference]
        axes.set_ylim(bottom=1.2 * min(*lows, -LINEAR_NATS / 5))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:+g}" if value else "0")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set(xlabel="weights of the linear projections read for a token", ylabel="loss over dense, nats per token")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(frameon=False, fontsize=8, loc="outside right upper")
    return figure
