"""Tables of figures as every command prints them."""

from __future__ import annotations

from rich import box
from rich.table import Table


def figures_table(title: str, *columns: str) -> Table:
    """An empty table: names on the left, figures flush right.

    Args:
        title: Stands above it.
        columns: Headings; none where the caller adds columns of its own kind.
    """
    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table
