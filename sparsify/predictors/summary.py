"""What training predictors found, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape

from sparsify.predictors.predictors import Predictors
from sparsify.sparsity.percent import count, percent
from sparsify.terminal import figures_table

MOST_ROWS = 40


def training_summary(predictors: Predictors, folder: Path, model: str) -> RenderableType:
    """Rank, recall and share of every block, and what to type next.

    Args:
        predictors: What was trained.
        folder: Where they lie.
        model: The model as the user named it.
    """
    facts = predictors.facts
    columns = ("block", "rank", "recall", "switched on", "fire")
    table = figures_table(
        f"Predictors of the {facts.input} input, at the score 0 on held-out text", *columns
    )
    for name, block in list(facts.blocks.items())[:MOST_ROWS]:
        shares = (block.recall, block.on_share, block.firing_share)
        table.add_row(name, str(block.rank), *map(percent, shares))
    left = len(facts.blocks) - MOST_ROWS
    ffn = 3 * facts.hidden * facts.neurons * facts.num_layers * facts.num_experts
    size = predictors.num_parameters
    return Group(
        "",
        table,
        *([f"and {left} more in predictors.json"] if left > 0 else []),
        f"{count(size)} parameters, {size / ffn:.1%} of the feed-forward weights.",
        f"[bold]Predictors[/bold]  {escape(str(folder))}",
        f"Next: [cyan]sparsify predictors judge {escape(model)} --predictors {escape(str(folder))}[/cyan]",
    )
