"""Results as tables that a person reads."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sparsify.commands.convert import Swap
from sparsify.commands.train import RunResult
from sparsify.methods.calibrate import Calibration
from sparsify.mixture.inspection import MixtureStats, SequencePreview
from sparsify.reporting.tables import figures_table
from sparsify.sparsity.schema import LayerRow, SparsityReport

BAR_CELLS = 24


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def recipes_table(rows: dict[str, str]) -> RenderableType:
    """Recipe names with what each is for."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, summary in rows.items():
        table.add_row(name, summary)
    return table


def layers_table(report: SparsityReport) -> Table:
    """Share of exact zeros of every layer, as numbers and as a bar."""
    table = figures_table(
        f"Exact zeros by layer (measured on {report.num_tokens:,} tokens)",
        "layer",
        "gate",
        "up",
        "product",
        "dead",
    )
    table.add_column("")
    for row in report.layer_rows:
        table.add_row(
            str(row.layer),
            _share(row.gate_zeros),
            _share(row.up_zeros),
            _share(row.product_zeros),
            f"{row.dead_neurons:,} of {row.num_neurons:,}",
            _bar(row),
        )
    return table


def _bar(row: LayerRow) -> Text:
    filled = round(BAR_CELLS * (row.product_zeros or 0.0))
    return Text("█" * filled, style="green") + Text("░" * (BAR_CELLS - filled), style="dim")


def run_summary(result: RunResult) -> RenderableType:
    """What a newcomer wants to know at the end of a run, and what to type next."""
    recipe, run = result.recipe, result.run
    budget_tokens = recipe.num_steps * recipe.step_tokens
    losses = figures_table(
        f"{recipe.name}: {recipe.activation.ffn_activation}, {budget_tokens:,} training tokens",
        "model",
        "validation loss",
        "perplexity",
        "exact zeros",
    )
    for stage in result.report.stages:
        losses.add_row(
            stage.name, f"{stage.loss:.3f}", f"{math.exp(stage.loss):,.1f}", _share(stage.zeros)
        )
    parts: list[RenderableType] = ["", losses, layers_table(result.report)]
    if result.samples:
        parts += ["[bold]The exported checkpoint, in a fresh process, continues[/bold]"]
        for prompt, continuation in result.samples:
            parts += [
                Text(prompt, style="bold cyan") + Text(continuation.rstrip(), style="default"),
                "",
            ]
    parts += [
        f"Export: {escape(result.checked)}.",
        "",
        _places(run.path),
        "",
        _next_commands(result),
    ]
    return Group(*parts)


def _places(path: Path) -> RenderableType:
    places = {
        "Report": path / "report" / "index.html",
        "Export": path / "export",
        "Metrics": path / "metrics.jsonl",
    }
    return "\n".join(
        f"[bold]{name:8}[/bold] {escape(str(place))}" for name, place in places.items()
    )


def _next_commands(result: RunResult) -> RenderableType:
    path = result.run.path
    ratio = f"sparsify train {result.given} mixture.instruction_token_share=0.3"
    # `make quickstart` calls the command by its path, and the next one is typed by hand.
    commands = {}
    if sys.prefix != sys.base_prefix and shutil.which("sparsify") is None:
        activate = Path(sys.prefix) / "bin" / "activate"
        commands["put sparsify on your path"] = f"source {activate}"
    commands |= {
        "another mixture ratio": ratio,
        "how sparse it is on your own text": f"sparsify report {path} --on YOUR_TEXT.txt",
        "a bundle to give away": f"sparsify export {path} --to my-sparse-model",
    }
    lines = [
        f"  [dim]# {purpose}[/dim]\n  [cyan]{escape(command)}[/cyan]"
        for purpose, command in commands.items()
    ]
    return "\n".join(["[bold]Next[/bold]", *lines])


def run_record(result: RunResult) -> dict[str, Any]:
    """The same as JSON."""
    return {
        "run": str(result.run.path),
        "stages": [stage.model_dump() for stage in result.report.stages],
        "zeros": result.report.product_zeros,
        "layers": [row.product_zeros for row in result.report.layer_rows],
        "samples": [{"prompt": prompt, "continuation": text} for prompt, text in result.samples],
        "export": result.checked,
    }


def report_summary(report: SparsityReport, folder: Path) -> RenderableType:
    """A report's headline, its layers, and where its page lies."""
    headline = (
        f"[bold]{report.product_zeros:.1%}[/bold] exact zeros ({report.ffn_activation}: gate {report.gate_zeros:.1%}, "
        f"up {report.up_zeros:.1%}), loss {report.loss:.3f} nats per token on {escape(report.text)}"
    )
    return Group(
        "", headline, layers_table(report), f"[bold]Report[/bold]  {folder / 'index.html'}"
    )


def replacement_record(swap: Swap) -> dict[str, Any]:
    """A conversion as JSON."""
    return {
        "folder": str(swap.converted.folder),
        "ffn_activation": swap.converted.config.ffn_activation,
        "ffn_thresholds": swap.converted.config.ffn_thresholds,
        "text": swap.text,
        "num_tokens": swap.num_tokens,
        "stages": [asdict(stage) for stage in swap.stages],
        "calibration_tokens": swap.calibration.num_tokens if swap.calibration else 0,
        "layers": swap.calibration.layers if swap.calibration else [],
    }


def replacement_table(swap: Swap) -> RenderableType:
    """A conversion as tables: the stages, and of a calibrated one what each layer gained."""
    config = swap.converted.config
    table = figures_table(
        f"{swap.converted.folder}, {config.base_ffn_activation} to {config.ffn_activation}, "
        f"on {swap.num_tokens:,} tokens: {swap.text}",
        "stage",
        "loss",
        "exact zeros",
    )
    for stage in swap.stages:
        table.add_row(stage.name, f"{stage.loss:.3f}", _share(stage.zeros))
    layers = [_calibrated_layers(swap.calibration)] if swap.calibration else []
    following = f"Next: [cyan]sparsify train RECIPE model.source={swap.converted.folder}[/cyan]"
    return Group("", table, *layers, following)


def _calibrated_layers(calibration: Calibration) -> RenderableType:
    table = figures_table(
        f"Relative error of the feed-forward answers on held-out calibration tokens ({calibration.num_tokens:,} in all)",
        "layer",
        "bare replacement",
        "before the refit",
        "after it",
        "signs turned",
        "",
    )
    for layer in calibration.layers:
        for number, expert in enumerate(layer["experts"]):
            name = str(layer["layer"])
            table.add_row(
                f"{name}, expert {number}" if len(layer["experts"]) > 1 else name,
                *(
                    "–" if expert[key] is None else f"{expert[key]:.3f}"
                    for key in ("error_bare", "error_before", "error_refitted")
                ),
                f"{expert['num_flipped']:,}",
                f"kept: {expert['kept_because']}" if expert["kept_because"] else "",
            )
    return table


def mixture_table(stats: MixtureStats) -> RenderableType:
    """Sizes of a mixture, one source per row."""
    table = figures_table(
        f"{stats.mixture}: {stats.budget_tokens:,} training tokens in sequences of {stats.sequence_length:,}",
        "source",
        "documents",
        "tokens",
        "tokens each",
        "loss on",
        "full",
        "epochs",
    )
    for name, source in stats.sources.items():
        more = "" if source.complete else "+"
        table.add_row(
            name,
            f"{source.documents:,}{more}",
            f"{source.tokens:,}{more}",
            f"{source.tokens_per_document_p50:,}–{source.tokens_per_document_p95:,}",
            _share(source.loss_share),
            _share(source.packing_efficiency),
            f"{source.epochs:.2f}",
        )
    notes = (
        "tokens each: half of the documents have at most the first number, 95% at most the second\n"
        "full: share of sequence positions that carry tokens after packing\n"
        "+ the source has more: it was read as far as the budget needs it"
    )
    dropped = [Text(note) for source in stats.sources.values() for note in source.dropped.notes]
    return Group("", table, Text(notes, style="dim"), *dropped)


def sequence_preview(sequence: SequencePreview) -> RenderableType:
    """One sequence with its documents between rules; tokens without loss are dim."""
    parts: list[RenderableType] = []
    for number, document in enumerate(sequence.documents, start=1):
        of = f"document {number} of {len(sequence.documents)} in this sequence"
        text = Text()
        for span in document:
            text.append(span.text, style="default" if span.carries_loss else "dim italic")
        parts += [Rule(Text(of, style="dim"), align="left", style="dim"), text]
    return Panel(
        Group(*parts),
        title=f"{sequence.source}: {sequence.num_tokens:,} tokens, {sequence.num_empty:,} left empty",
        subtitle="dim italic: no loss",
        title_align="left",
        subtitle_align="right",
    )
