"""The result of `sparsify bench train` as tables."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from sparsify.benchmarks.training_result import Loop, Ratio, TrainBench
from sparsify.terminal import figures_table


def training_table(bench: TrainBench) -> RenderableType:
    """The loops, the validation, and what the numbers rest on."""
    return Group("", _loops_table(bench), _probe_table(bench), _rests_on(bench))


def _loops_table(bench: TrainBench) -> Table:
    table = figures_table(
        "A training step", "", "tokens/s", "against", "ratio", "middle half of pairs"
    )
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
        table.add_row(label, speed)
        return
    form = "{:+.1%} time" if added else "{:.2f} × as fast"
    spread = "{:+.1%} to {:+.1%}" if added else "{:.2f} to {:.2f}"
    middle = spread.format(ratio.lower_quartile, ratio.upper_quartile)
    table.add_row(label, speed, against, form.format(ratio.median), middle)


def _probe_table(bench: TrainBench) -> Table:
    probe = bench.probe
    table = figures_table(
        f"A validation of {probe.held_out_tokens:,} tokens after every {probe.every_tokens:,} tokens of training",
        "",
        "seconds",
        "share of training",
    )
    table.add_row("all of it", f"{probe.validation_seconds:.2f}", f"{probe.validation_share:.2%}")
    table.add_row("of it the probe", f"{probe.probe_seconds:.2f}", f"{probe.probe_share:.2%}")
    return table


def _rests_on(bench: TrainBench) -> str:
    return (
        f"[dim]Recipe {bench.recipe}: {bench.parameters / 1e6:,.1f}M parameters, {bench.precision}, ZeRO stage "
        f"{bench.zero_stage}, one process; {bench.step_tokens:,} tokens a step in windows of {bench.window_tokens:,}.\n"
        f"{bench.device}, {bench.threads} CPU thread(s). Clock: {bench.clock}. {bench.blocks} block(s) of "
        f"{bench.block_steps} step(s) of each loop, taken in turns after one to warm up.\n"
        "Medians; ratios are medians over pairs of blocks. All loops have the same weights, windows and DeepSpeed "
        "configuration.[/dim]"
    )
