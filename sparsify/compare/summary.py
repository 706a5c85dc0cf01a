"""A comparison for the terminal."""

from __future__ import annotations

import re
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sparsify.compare.evaluation_report import evaluation_tables
from sparsify.compare.evaluations import EvaluationComparison
from sparsify.compare.schema import Comparison
from sparsify.compare.tables import TextTable, tables
from sparsify.compare.write import PAGE_FILE
from sparsify.reporting.tables import figures_table

MIN_NAME_CELLS = 16
LONG_WORD = re.compile(r"(\S{8,}?_)")


def comparison_summary(comparison: Comparison, folder: Path) -> RenderableType:
    """The tables and caveats of a comparison, and the path of the page."""
    return _summary(tables(comparison), comparison.notes, folder)


def evaluations_summary(comparison: EvaluationComparison, folder: Path) -> RenderableType:
    """The tables and caveats of a comparison of evaluations, and the path of the page."""
    return _summary(evaluation_tables(comparison), comparison.notes, folder)


def _summary(tables: list[TextTable], notes: list[str], folder: Path) -> RenderableType:
    return Group(
        "",
        *map(_table, tables),
        *(Text(note) for note in notes),
        *([""] if notes else []),
        f"[bold]Comparison[/bold]  {escape(str(folder / PAGE_FILE))}",
    )


def _table(text: TextTable) -> Table:
    table = figures_table(text.title)
    # A narrow terminal folds names, and headings between their words, but never numbers.
    for index, column in enumerate(text.header):
        heading = LONG_WORD.sub(r"\1\n", column) if index else column
        longest = max(len(row[index]) for row in text.rows)
        least = (
            max([longest, *map(len, heading.split())]) if index else min(longest, MIN_NAME_CELLS)
        )
        justify = "right" if index else "left"
        table.add_column(Text(heading), justify=justify, overflow="fold", min_width=least)
    for row in text.rows:
        table.add_row(*map(Text, row))
    return table
