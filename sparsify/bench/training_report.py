"""The result of `sparsify bench train`, and its tables."""

from __future__ import annotations

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.reporting.tables import Table


class QuartileRatio(BaseModel):
    median: float
    lower_quartile: float
    upper_quartile: float


class Loop(BaseModel):
    tokens_per_second: float
    """Median over blocks."""
    step_seconds: list[float]
    """Seconds per step in each block."""
    losses: list[float]
    """Losses of the first steps; all loops start from the same weights and see the same sequences."""


class Probe(BaseModel):
    """Cost of a validation, and of the sparsity probe in it."""

    every_tokens: int
    """Training tokens between two validations: eval.every_tokens."""
    held_out_tokens: int
    validation_seconds: float
    probe_seconds: float
    """The part of `validation_seconds` that is due to the probe."""
    validation_share: float
    """Time of a validation as a share of the training between two validations."""
    probe_share: float


class TrainBench(BaseModel):
    """Timings of loops with the same data, model, precision and DeepSpeed configuration."""

    recipe: str
    parameters: int
    precision: str
    zero_stage: int
    device: str
    clock: str
    threads: int
    step_tokens: int
    sequence_length: int
    block_steps: int
    blocks: int
    bare: Loop
    ours: Loop
    trainer: Loop
    loop_overhead: QuartileRatio
    """Step time of our loop over that of the bare engine, minus 1."""
    speed_against_trainer: QuartileRatio
    """Tokens per second of our loop over those of the Trainer."""
    probe: Probe


def training_table(bench: TrainBench) -> RenderableType:
    return Group("", _loops_table(bench), _probe_table(bench), _rests_on(bench))


def _loops_table(bench: TrainBench) -> Table:
    table = Table("A training step", ["", "tokens/s", "baseline", "ratio", "interquartile range"])
    _add(table, "bare engine: forward, backward, step", bench.bare)
    _add(table, "sparsify", bench.ours, "bare engine", bench.loop_overhead, added=True)
    _add(table, "sparsify", bench.ours, "Trainer", bench.speed_against_trainer)
    _add(table, "transformers.Trainer", bench.trainer)
    return table


def _add(
    table: Table,
    label: str,
    loop: Loop,
    against: str = "",
    ratio: QuartileRatio | None = None,
    *,
    added: bool = False,
) -> None:
    speed = f"{loop.tokens_per_second:,.0f}"
    if ratio is None:
        table.add(label, speed)
        return
    form = "{:+.1%} time" if added else "{:.2f} × as fast"
    spread = "{:+.1%} to {:+.1%}" if added else "{:.2f} to {:.2f}"
    middle = spread.format(ratio.lower_quartile, ratio.upper_quartile)
    table.add(label, speed, against, form.format(ratio.median), middle)


def _probe_table(bench: TrainBench) -> Table:
    probe = bench.probe
    table = Table(
        f"A validation of {probe.held_out_tokens:,} tokens after every {probe.every_tokens:,} tokens of training",
        ["", "seconds", "share of training"],
    )
    table.add("total", f"{probe.validation_seconds:.2f}", f"{probe.validation_share:.2%}")
    table.add("of which probe", f"{probe.probe_seconds:.2f}", f"{probe.probe_share:.2%}")
    return table


def _rests_on(bench: TrainBench) -> Text:
    return Text(
        f"Recipe {bench.recipe}: {bench.parameters / 1e6:,.1f}M parameters, {bench.precision}, ZeRO stage "
        f"{bench.zero_stage}, one process; {bench.step_tokens:,} tokens a step in sequences of {bench.sequence_length:,}.\n"
        f"{bench.device}, {bench.threads} CPU thread(s). Clock: {bench.clock}. {bench.blocks} interleaved block(s) of "
        f"{bench.block_steps} step(s) of each loop, after one warm-up block.\n"
        "Medians; ratios are medians over pairs of blocks. All loops have the same weights, sequences and DeepSpeed "
        "configuration.",
        "dim",
    )
