"""What training predictors found, for a terminal."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from sparsify.predictors.predictors import Predictors
from sparsify.sparsity.percent import count, percent

MOST_ROWS = 40


def training_summary(predictors: Predictors, folder: Path, model: str) -> RenderableType:
    """Rank, recall and share of every block, and what to type next.

    Args:
        predictors: What was trained.
        folder: Where they lie.
        model: The model as the user named it.
    """
    facts = predictors.facts
    table = Table(
        title=f"Predictors of the {facts.input} input, at the score 0 on held-out text",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    columns = ("block", "rank", "recall", "switched on", "fire")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
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
