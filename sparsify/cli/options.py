"""Output and options shared by the commands."""

from __future__ import annotations

import logging
from typing import Annotated, TypeVar

import typer
from rich.console import Console, RenderableType

from sparsify.errors import RecipeError
from sparsify.reporting.log_lines import error_console, print_log_lines

console = Console(highlight=False, soft_wrap=True)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as key=value, for example training.budget_tokens=1_000_000"),
]
Number = TypeVar("Number", int, float)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def print_line(line: str) -> None:
    console.print(line, markup=False)


def print_result(record: str, table: RenderableType, as_json: bool) -> None:
    console.print_json(record) if as_json else console.print(table)


def log_progress(*, quiet: bool = False) -> None:
    """Prints progress as lines; with `quiet` only warnings, on standard error, since standard output holds JSON."""
    if quiet:
        print_log_lines(logging.WARNING, to=error_console)
    else:
        print_log_lines()


def numbers(option: str, text: str, kind: type[Number]) -> list[Number]:
    """Parses an option's comma-separated numbers; an empty list if there are none.

    Raises:
        RecipeError: If one of them is not a number.
    """
    if not text.strip():
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError as error:
        raise RecipeError(f"{option} is {text!r}.", allowed="Comma-separated numbers, such as 1,2,4.") from error
