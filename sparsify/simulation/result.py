"""What `sparsify simulate` found: as a record, a table and a picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots
from pydantic import BaseModel, ConfigDict

from sparsify.errors import StorageError
from sparsify.files import write_bytes
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image
from sparsify.reporting.tables import Table
from sparsify.simulation.device import Device

FORMATS = (".png", ".svg")
MB = 1e6


class Parts(BaseModel):
    """Seconds of a token: reading what always stays in memory, the slots that are in memory, waiting for flash, and what is fixed."""

    model_config = ConfigDict(frozen=True)

    static: float
    neurons: float
    flash: float
    fixed: float


class Simulated(BaseModel):
    """One memory, policy and prefetcher; means over sequences, bytes and seconds of a token.

    Attributes:
        memory_bytes: For weights, keys and values, and predictors.
        cached_share: Share of the feed-forward weights that memory holds.
        gamma: Of cache-aware masks; None for the model's own.
        hit_rate: Share of the needed bytes of slots that was resident.
        recall: Share of what was needed and not resident that was prefetched; None without prefetch.
        over_fetch: Bytes of slots that were read over those that had to be read; None without prefetch.
        needed_bytes: Of slots.
        flash_bytes: Read from flash, in whole pages.
        stall_bytes: Of slots that were read only when they were needed.
        flash_reads: Number of reads.
        dense_tokens_per_second: With every neuron read, on the same device and memory.
        loss: Nats per token; None unless it was measured.
    """

    model_config = ConfigDict(frozen=True)

    memory_bytes: int
    cached_share: float
    policy: str
    prefetch: str
    gamma: float | None
    hit_rate: float
    recall: float | None
    over_fetch: float | None
    needed_bytes: float
    flash_bytes: float
    stall_bytes: float
    flash_reads: float
    seconds: Parts
    tokens_per_second: float
    dense_tokens_per_second: float
    loss: float | None

    @property
    def words(self) -> str:
        parts = [self.policy]
        if self.gamma is not None:
            parts.append(f"γ {self.gamma:g}")
        if self.prefetch != "none":
            parts.append(self.prefetch)
        return ", ".join(parts)


class Simulation(BaseModel):
    """A model on a device.

    Attributes:
        text: What was decoded.
        sequences: How many decodes.
        tokens: Of each.
        fetch: What a slot is: one of `trace.FETCHES`.
        ffn_static_bytes: Feed-forward weights that always stay in memory.
        prompt_seconds: Until the first token of a prompt that needs every neuron: all weights are read once.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    device: Device
    text: str
    sequences: int
    tokens: int
    fetch: str
    weights_bits: float
    attention_bytes: float
    output_layer_bytes: float
    keys_and_values_bytes: float
    predictors_bytes: float
    ffn_bytes: float
    ffn_static_bytes: float
    prompt_seconds: float
    rows: list[Simulated]


def simulation_table(simulation: Simulation) -> Table:
    with_loss = any(row.loss is not None for row in simulation.rows)
    with_prefetch = any(row.prefetch != "none" for row in simulation.rows)
    header = ["memory", "FFN in it", "policy", "hits"]
    header += ["recall", "over-fetch"] if with_prefetch else []
    header += ["from flash\nMB", "stall\nMB", "static\nms", "neurons\nms", "flash\nms", "tokens/s", "dense\ntokens/s"]
    header += ["loss"] if with_loss else []
    title = (
        f"{simulation.model} on {simulation.device.name}: decoding {simulation.sequences} × {simulation.tokens} tokens, "
        f"per token"
    )
    table = Table(title, header, notes=simulation_notes(simulation), left=(0, 2))
    for row in simulation.rows:
        cells = [_size(row.memory_bytes), f"{row.cached_share:.0%}", row.words, f"{row.hit_rate:.1%}"]
        if with_prefetch:
            cells += ["–" if one is None else f"{one:.2f}" for one in (row.recall, row.over_fetch)]
        seconds = row.seconds
        cells += [_digits(num_bytes / MB) for num_bytes in (row.flash_bytes, row.stall_bytes)]
        cells += [_digits(one * 1e3) for one in (seconds.static + seconds.fixed, seconds.neurons, seconds.flash)]
        cells += [_digits(row.tokens_per_second), _digits(row.dense_tokens_per_second)]
        cells += ["–" if row.loss is None else f"{row.loss:.3f}"] if with_loss else []
        table.add(*cells)
    return table


def simulation_notes(simulation: Simulation) -> list[str]:
    """What a reader must know: the parts of the model, and where the device's numbers come from."""
    parts = {
        "attention": simulation.attention_bytes,
        "output layer": simulation.output_layer_bytes,
        "keys and values": simulation.keys_and_values_bytes,
        "predictors": simulation.predictors_bytes,
        "feed-forward blocks": simulation.ffn_bytes,
        "of these always in memory": simulation.ffn_static_bytes,
    }
    words = ", ".join(f"{name} {_digits(num_bytes / MB)} MB" for name, num_bytes in parts.items() if num_bytes)
    figures: list[str] = []
    for name, figure in simulation.device:
        if isinstance(figure, BaseModel):
            figures.append(f"{name} {_plain(figure.value)} ({figure.source})")  # pyright: ignore[reportAttributeAccessIssue]
    return [
        f"Weights of {simulation.weights_bits:g} bits: {words}. Slots: {simulation.fetch}. A prompt that needs every neuron "
        f"takes at least {simulation.prompt_seconds:.3g} s.",
        f"Device: {'; '.join(figures)}; flash and memory {'at once' if simulation.device.concurrent else 'in turns'}.",
    ]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / MB:.3g} MB"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def check_picture(path: Path) -> None:
    """Raises StorageError for a suffix that no picture has."""
    if path.suffix not in FORMATS:
        raise StorageError(f"{path} is not a picture.", allowed=f"A name that ends in {' or '.join(FORMATS)}.")


def write_picture(simulation: Simulation, path: Path) -> None:
    """A bar of milliseconds for each row, by part."""
    check_picture(path)
    write_bytes(path, image(partial(draw, simulation), "simulation", LIGHT, "svg" if path.suffix == ".svg" else "png"))


def draw(simulation: Simulation, theme: Theme) -> Figure:
    rows = simulation.rows
    figure, axes = subplots(figsize=(WIDTH_INCHES, 1.3 + 0.34 * len(rows)))
    axes = cast(Axes, axes)
    places = [-number for number in range(len(rows))]
    left = [0.0] * len(rows)
    parts: list[tuple[str, str, Any]] = [
        ("always in memory", theme.baseline, lambda row: row.seconds.static + row.seconds.fixed),
        ("neurons in memory", theme.product, lambda row: row.seconds.neurons),
        ("waiting for flash", theme.gate, lambda row: row.seconds.flash),
    ]
    for name, colour, of in parts:
        widths = [1e3 * of(row) for row in rows]
        axes.barh(places, widths, left=left, color=colour, label=name, height=0.66)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, end, row in zip(places, left, rows, strict=True):
        axes.text(end, place, f"  {_digits(row.tokens_per_second)} tokens/s", va="center", color=theme.muted)
    axes.set_yticks(places, [f"{_size(row.memory_bytes)}, {row.words}" for row in rows])
    axes.set_xlim(0, 1.2 * max(left))
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("milliseconds per token")
    axes.set_title(f"{simulation.model} on {simulation.device.name}")
    figure.legend(loc="outside lower center", ncols=3)
    return figure
