"""What `sparsify bench offload` measured, as a table and a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots

from sparsify.bench.offload import OffloadBench
from sparsify.bench.timing import quartiles
from sparsify.errors import RunError
from sparsify.files import write_bytes
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image
from sparsify.reporting.tables import Table


def offload_table(bench: OffloadBench) -> Table:
    table = Table(
        f"{bench.layers} layers of {bench.shape} in bf16, {bench.model_gb:.1f} GB, {bench.ffn_gb:.1f} GB of them feed-forward; "
        f"{bench.neuron_gb:.2f} GB of memory for neurons, {bench.limit_gb:.2f} GB in all, {bench.limit_gb + bench.base_gb:.2f} GB "
        f"with Python and torch; {bench.active:.0%} of the neurons fire "
        f"(skew {bench.skew:g}); {bench.threads} threads; {bench.rounds} rounds of {bench.tokens} tokens; the disk reads "
        f"{bench.disk_mb_per_second:,.0f} MB/s",
        [
            "",
            "ms per token",
            "MB read",
            "of the disk",
            "hits",
            "in vain",
            "waiting",
            "memory MB",
            "times dense",
            "times mmap",
        ],
        notes=[bench.left_out] if bench.left_out else [],
    )
    for one in bench.ways:
        table.add(
            one.name,
            f"{quartiles(one.ms_per_token)[0]:,.0f}",
            f"{one.read_mb_per_token:,.0f}" if one.read_mb_per_token else "",
            f"{one.disk_mb_per_token:,.0f}",
            _percent(one.hit_rate),
            _percent(one.over_fetch),
            _percent(one.wait_share),
            f"{one.peak_mb:,.0f}",
            _ratio(one.to_dense),
            _ratio(one.to_mmap),
        )
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _ratio(of: tuple[float, float, float] | None) -> str:
    return "" if of is None else f"{of[0]:.2f} ({of[1]:.2f} to {of[2]:.2f})"


def check_plot(path: Path) -> None:
    """Raises RunError, before anything is measured, if a picture cannot be drawn in the format that a name says."""
    if path.suffix not in (".png", ".svg"):
        raise RunError(f"{path} is not a supported image format.", allowed="A name ending in .png or .svg.")


def write_plot(bench: OffloadBench, path: Path) -> None:
    write_bytes(path, image(partial(_draw, bench), "offload", LIGHT, "svg" if path.suffix == ".svg" else "png"))


def _draw(bench: OffloadBench, theme: Theme) -> Figure:
    """Tokens per second of each way, with the range of the rounds."""
    figure, axes = subplots(figsize=(WIDTH_INCHES, 0.9 + 0.32 * len(bench.ways)))
    axes = cast(Axes, axes)
    for place, one in enumerate(reversed(bench.ways)):
        middle, low, high = (1e3 / ms for ms in quartiles(one.ms_per_token))
        colour = theme.baseline if one.name.startswith("dense") else theme.product
        spread = [[middle - min(low, high)], [max(low, high) - middle]]
        axes.barh(place, middle, color=colour, height=0.65, xerr=spread, ecolor=theme.ink, capsize=2)
        axes.text(middle, place, f"  {middle:.2f}", va="center")
    axes.set_yticks(range(len(bench.ways)), [one.name for one in reversed(bench.ways)])
    axes.grid(visible=True, axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("tokens per second")
    axes.set_title(
        f"{bench.layers} layers of {bench.shape}, {bench.ffn_gb:.1f} GB of neurons, {bench.neuron_gb:.1f} GB of memory for them"
    )
    return figure
