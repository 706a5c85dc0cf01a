"""What the modules of the command line share: where they print, and options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False, soft_wrap=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as key=value, for example training.budget_tokens=1_000_000"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def say(line: str) -> None:
    """Prints a line as it is."""
    console.print(line, markup=False)


def quiet(_line: str) -> None:
    """Prints nothing: what else stands on the terminal is JSON."""
