"""What `sparsify bench train` measures.

The result of `sparsify bench train` as tables.
"""

from __future__ import annotations

from pydantic import BaseModel
from rich.console import Group, RenderableType

from sparsify.reporting.tables import Table


class Ratio(BaseModel):
    """A ratio over the pairs of blocks: its median, and the half of them that lies in the middle."""

    median: float
    lower_quartile: float
    upper_quartile: float


class Loop(BaseModel):
    """One training loop."""

    tokens_per_second: float
    """Median over the blocks."""
    step_seconds: list[float]
    """Of one step, in each block."""
    losses: list[float]
    """Of the first steps; all loops start from the same weights and see the same sequences."""


class Probe(BaseModel):
    """What the validation costs that reads the sparsity, and what the probe has in it."""

    every_tokens: int
    """Training tokens between two validations: eval.every_tokens."""
    held_out_tokens: int
    validation_seconds: float
    probe_seconds: float
    """Of it, what the same validation would save without the probe."""
    validation_share: float
    """Time of validations as a share of the training between them."""
    probe_share: float


class TrainBench(BaseModel):
    """Loops over the same data, model, precision and DeepSpeed configuration."""

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
    loop_overhead: Ratio
    """Seconds of our loop's step over those of the bare engine's, minus 1."""
    speed_against_trainer: Ratio
    """Tokens/s of our loop over the Trainer's."""
    probe: Probe


def training_table(bench: TrainBench) -> RenderableType:
    """The loops, the validation, and what the numbers rest on."""
    return Group("", _loops_table(bench), _probe_table(bench), _rests_on(bench))


def _loops_table(bench: TrainBench) -> Table:
    table = Table("A training step", ["", "tokens/s", "against", "ratio", "middle half of pairs"])
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
    ratio: Ratio | None = None,
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
    table.add("all of it", f"{probe.validation_seconds:.2f}", f"{probe.validation_share:.2%}")
    table.add("of it the probe", f"{probe.probe_seconds:.2f}", f"{probe.probe_share:.2%}")
    return table


def _rests_on(bench: TrainBench) -> str:
    return (
        f"[dim]Recipe {bench.recipe}: {bench.parameters / 1e6:,.1f}M parameters, {bench.precision}, ZeRO stage "
        f"{bench.zero_stage}, one process; {bench.step_tokens:,} tokens a step in sequences of {bench.sequence_length:,}.\n"
        f"{bench.device}, {bench.threads} CPU thread(s). Clock: {bench.clock}. {bench.blocks} block(s) of "
        f"{bench.block_steps} step(s) of each loop, taken in turns after one to warm up.\n"
        "Medians; ratios are medians over pairs of blocks. All loops have the same weights, sequences and DeepSpeed "
        "configuration.[/dim]"
    )
