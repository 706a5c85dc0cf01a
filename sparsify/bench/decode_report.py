"""The result of `sparsify bench decode` as tables and as a figure of speed-up against sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import cast

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.pyplot import subplots
from matplotlib.ticker import PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.bench.decode_result import (
    VARIANTS,
    DecodeBench,
    FfnPoint,
    ModelPoint,
    crossover,
    formats,
)
from sparsify.errors import RunError
from sparsify.files import write_bytes
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image
from sparsify.reporting.tables import Table

GIGA, MEGA = 1e9, 1e6
SHOWN_LAYERS = 5
WORTHWHILE = 1.5
"""Speed-up below which a model is called too small."""
WHERE = ("zeros", "gates on", "batch", "threads")


def decode_table(bench: DecodeBench) -> RenderableType:
    parts: list[RenderableType] = [""]
    if bench.ffn:
        parts += [_speed(bench), _bytes(bench)]
        several_batches = len({one.tokens for one in bench.ffn}) > 1
        parts += [_crossover(bench), ""] if several_batches else []
    for model in bench.models:
        parts += [one for one in (model_table(model), _parts(model), _layers(model)) if one is not None]
    parts += [_speculation(bench)] if bench.speculation else []
    return Group(*parts, _rests_on(bench))


def _speed(bench: DecodeBench) -> Table:
    table = Table(
        f"One block, {bench.hidden}×{bench.neurons}, {formats(bench.dtype, bench.weights)}: speed-up ± half the interquartile range of the repeats",
        _headings(
            [*WHERE, "dense", "exact", "exact", "predictor"],
            ["", "", "", "", "vs torch", "vs torch", "vs dense", "vs dense"],
        ),
    )
    for point in bench.ffn:
        table.add(
            *_where(point),
            str(point.ratio("dense", "torch")),
            str(point.ratio("exact", "torch")),
            str(point.ratio("exact", "dense")),
            str(point.ratio("predictor", "dense")),
        )
    return table


def _crossover(bench: DecodeBench) -> str:
    won, lost = crossover(bench.ffn)
    if won is None:
        return f"Exact decoding is slower than torch's dense product from batch {lost} on."
    upto = f"Exact decoding is faster than torch's dense product up to batch {won}"
    return f"{upto}, and slower from batch {lost} on." if lost else f"{upto}, the largest measured."


def _bytes(bench: DecodeBench) -> Table:
    everything = bench.ffn[0].bytes_read
    table = Table(
        f"Weights read (torch {everything['torch'] / MEGA:.1f} MB, dense {everything['dense'] / MEGA:.1f} MB) and what that "
        "allows: MB, times as fast as dense, and how much of this machine's reading speed is used",
        _headings(
            [*WHERE, "exact", "pred.", "exact", "pred.", "torch, dense, exact, pred."],
            ["", "", "", "", "MB", "MB", "limit", "limit", "% of bandwidth"],
        ),
    )
    for point in bench.ffn:
        read = point.bytes_read
        shares = (f"{100 * point.read_share(one):4.0f}" for one in VARIANTS)
        table.add(
            *_where(point),
            *(f"{read[one] / MEGA:.1f}" for one in ("exact", "predictor")),
            f"{point.ideal('exact'):.2f}",
            f"{point.ideal('predictor'):.2f}",
            "".join(shares),
        )
    return table


def _where(point: FfnPoint) -> list[str]:
    return [
        f"{1 - point.active_share:.0%}",
        f"{point.gate_share:.0%}",
        str(point.tokens),
        str(point.threads),
    ]


NAMES = {
    "torch": "dense, torch",
    "llama.cpp": "dense, llama.cpp",
    "dense": "dense, our kernels",
    "exact": "exact",
    "predictor": "predictor",
    "packed": "dense rows, packed",
    "both": "exact, packed",
}


def export_speed(model: ModelPoint) -> RenderableType:
    """The speed of a run's export against its dense self; for a model that gains little, what shows more."""
    self = min(("torch", "dense"), key=lambda name: model.decode_seconds[name].median)
    best = "both" if "both" in model.decode_seconds else "exact"
    gain, limit = model.ratio(best, self), model.bytes_read[self] / model.bytes_read[best]
    packed = ", without the zeros among the weights," if best == "both" else ""
    said = f"Exact decoding{packed} is {gain} times as fast as {NAMES[self]}; the bytes read allow {limit:.2f} times."
    if gain.low < WORTHWHILE:
        said += f" A model of {model.bytes_read[self] / MEGA:,.0f} MB is too small to gain more. A block of Mistral-7B's shape:"
        return Group(model_table(model), Text(said), Text("  sparsify bench decode --layers 0\n", "cyan"))
    return Group(model_table(model), Text(f"{said}\n"))


def model_table(model: ModelPoint) -> Table:
    """Speed of each way to decode: against llama.cpp if it was measured, otherwise against torch."""
    baseline = "llama.cpp" if "llama.cpp" in model.decode_seconds else "torch"
    table = Table(
        f"{model.model}: {model.layers} layers, {formats(model.dtype, model.weights)}, {model.threads} thread(s); "
        f"{model.active_share:.1%} of the neurons fire",
        _headings(
            ["decoding", "tokens/s", "speed-up", "limit by", "MB per", "% of", "prompt"],
            ["", "", f"over {baseline}", "bytes", "token", "bandwidth", f"of {model.prompt_tokens}"],
        ),
    )
    for name, timing in model.decode_seconds.items():
        prompt = model.prompt_seconds
        table.add(
            NAMES[name],
            f"{1 / timing.median:.1f}",
            str(model.ratio(name, baseline)),
            f"{model.bytes_read[baseline] / model.bytes_read[name]:.2f}",
            f"{model.bytes_read[name] / MEGA:,.0f}",
            f"{model.read_share(name):.0%}",
            f"{prompt[baseline].median / prompt[name].median:.2f}",
        )
    return table


def _parts(model: ModelPoint) -> Table | None:
    """Where the time of a native step goes."""
    native = {name: parts for name, parts in model.parts.items() if len(parts) > 2}
    if not native:
        return None
    names = list(next(iter(native.values())))
    table = Table("Milliseconds of a token by part of the model, and their shares", ["decoding", "all", *names])
    for name, parts in native.items():
        total = sum(parts.values())
        each = (f"{1000 * parts[part]:.2f}\n{parts[part] / total:.1%}" for part in names)
        table.add(NAMES[name], f"{1000 * total:.2f}", *each)
    return table


def _speculation(bench: DecodeBench) -> Table:
    table = Table(
        "Steps of several tokens, in steps of one, and the share of drafts to accept before free drafts pay",
        ["decoding", "neurons in common", "tokens", "cost", "acceptance"],
    )
    for one in bench.speculation:
        needed = "never" if one.break_even is None else f"{one.break_even:.0%}"
        table.add(NAMES[one.variant], f"{one.overlap:.0%}", str(one.tokens), str(one.cost), needed)
    return table


def _layers(model: ModelPoint) -> Table:
    shown = sorted(model.reads, key=lambda one: one.touched_share, reverse=True)[:SHOWN_LAYERS]
    table = Table(
        "Layers that limit the speed-up most: their exact blocks read the most rows",
        ["layer", "neurons that fire", "rows read", "limit of the block"],
    )
    for one in shown:
        table.add(
            str(one.layer),
            f"{one.fired_share:.1%}",
            f"{one.touched_share:.1%}",
            f"{one.ideal:.2f}×",
        )
    return table


def _rests_on(bench: DecodeBench) -> Text:
    busy = bench.load_before > 0.5
    warning = (
        f" The load average was {bench.load_before:.1f} before the start: other processes were running, so use only the ratios."
        if busy
        else ""
    )
    return Text(
        f"{'; '.join(filter(None, (bench.processor, _reading(bench))))}{warning}\n"
        f"dense: our {'Triton' if bench.device == 'cuda' else 'C++'} kernel, reading every row{_rounded(bench)}. Medians of "
        f"{bench.repeats} interleaved repeats; ratios are medians over pairs; same weights, same process.\n"
        f"Predictor: rank {bench.rank or 'a quarter of the hidden size'}, perfect by construction, including its own cost. Gates on: share of neurons whose gate "
        f"is positive, which decides how many rows of the up projection exact decoding skips.{_baselines(bench)}",
        "dim",
    )


def _baselines(bench: DecodeBench) -> str:
    """What the rows of whole models are, and why llama.cpp is not among them."""
    if not bench.models:
        return ""
    reasons = {one.without_llamacpp for one in bench.models} - {None}
    without = "".join(f" llama.cpp was not measured: {reason}." for reason in reasons)
    if bench.device == "cuda":
        return f"\nWhole models: {captured_words(bench.models)}; prompts as generate() runs them.{without}"
    return (
        "\nWhole models: the prompt's columns and rows are of the same tokens; llama.cpp has silu in place of the activation, and "
        f"weights of as many bits.{without}"
    )


def captured_words(models: Sequence[ModelPoint]) -> str:
    """Which ways decode by CUDA graphs."""
    plain = {NAMES[key] for one in models for key in one.decode_seconds if key not in one.captured}
    if not plain:
        return "each step is one CUDA graph, torch's as well"
    return f"each step is one CUDA graph, but as generate() runs it with {', '.join(sorted(plain))}"


def _rounded(bench: DecodeBench) -> str:
    if bench.weights == "stored":
        return ""
    return f", in {bench.weights} blocks like exact and predictor; torch reads {bench.dtype}"


def _reading(bench: DecodeBench) -> str:
    speeds = [one.read_bytes_per_second / GIGA for one in bench.ffn if one.threads == bench.threads]
    speeds += [one.read_bytes_per_second / GIGA for one in bench.models]
    if not speeds:
        return ""
    return f"{min(speeds):.0f} to {max(speeds):.0f} GB/s memory bandwidth with {bench.threads} thread(s), measured interleaved."


def _headings(columns: Sequence[str], below: Sequence[str]) -> list[str]:
    return [f"{column}\n{under}" for column, under in zip(columns, below, strict=True)]


FORMATS = (".png", ".svg")


def check_figure(path: Path, sparsities: Sequence[float]) -> None:
    """Checks that a figure can be drawn, before anything is measured.

    Raises:
        RunError: If its format is not supported, or nothing is measured that it could show.
    """
    if path.suffix not in FORMATS:
        raise RunError(
            f"{path} is not a supported image format.",
            allowed=f"A name ending in {' or '.join(FORMATS)}.",
        )
    if not sparsities:
        raise RunError("--plot shows blocks over --sparsity, which is empty.")


def write_figure(bench: DecodeBench, path: Path) -> None:
    kind = "svg" if path.suffix == ".svg" else "png"
    write_bytes(path, image(partial(draw, bench), "decoding", LIGHT, kind))


def draw(bench: DecodeBench, theme: Theme) -> Figure:
    """One line per kind of decoding; dashed: the limit that follows from the bytes read."""
    figure, axes = subplots(figsize=(WIDTH_INCHES, 0.5 * WIDTH_INCHES))
    axes = cast(Axes, axes)
    single = [one for one in bench.ffn if one.tokens == 1 and one.threads == bench.threads]
    decides = [one for one in single if one.gate_share == one.active_share]
    independent = [one for one in single if one.gate_share != one.active_share]
    lines = [
        ("predictor", "predictor", decides, theme.product),
        ("exact, zeros from the gate", "exact", decides, theme.gate),
        ("exact, gate and up independent", "exact", independent, theme.up),
    ]
    for label, variant, points, colour in lines:
        _line(axes, label, variant, sorted(points, key=lambda p: -p.active_share), colour)
    axes.axhline(1.0, color=theme.ink, linewidth=0.8)
    axes.set_title(
        f"Decoding one block of {bench.hidden}×{bench.neurons} in {formats(bench.dtype, bench.weights)}, batch 1"
    )
    axes.set_xlabel("zeros among the activations")
    axes.set_ylabel("speed-up over our dense kernel")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.plot([], [], color=theme.ink, linestyle=(0, (4, 3)), label="limit by bytes read")
    axes.legend(frameon=False)
    return figure


def _line(axes: Axes, label: str, variant: str, points: list[FfnPoint], colour: str) -> None:
    zeros = [1 - one.active_share for one in points]
    ratios = [one.ratio(variant, "dense") for one in points]
    middles = [one.median for one in ratios]
    spread = [
        [one.median - one.low for one in ratios],
        [one.high - one.median for one in ratios],
    ]
    axes.errorbar(zeros, middles, yerr=spread, color=colour, marker="o", capsize=2, label=label)
    axes.plot(zeros, [one.ideal(variant) for one in points], color=colour, linestyle=(0, (4, 3)))
