"""Output and options shared by the commands."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import RenderableType
from rich.text import Text

from sparsify.reporting.log_lines import error_console, print_log_lines
from sparsify.reporting.terminal import PlainConsole
from sparsify.trust import trust_code

console = PlainConsole(soft_wrap=True)
LOG_SECONDS = 30.0
"""Shortest time between two lines of progress in a log file."""

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as key=value, for example training.budget_tokens=1_000_000"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _trusted(given: bool) -> bool:
    if given:
        trust_code()
    return given


TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code",
        callback=_trusted,
        help="Run the Python code that comes with a suite or a bundle. Read it first.",
    ),
]


def print_line(line: str) -> None:
    console.print(line)


def print_result(record: str, table: RenderableType, as_json: bool) -> None:
    console.print_json(record) if as_json else console.print(table)


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Yields what shows a line about the work in progress on standard error: on a terminal in place of the line before,
    elsewhere (in a log file) as a line of its own, at most every LOG_SECONDS.
    """
    own = PlainConsole(stderr=True)
    if own.is_terminal:
        with own.status("") as status:
            yield lambda line: status.update(Text(line))
        return
    shown = -math.inf

    def log(line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= LOG_SECONDS:
            shown = time.monotonic()
            own.print(Text(line), soft_wrap=True)

    yield log


def log_progress(*, quiet: bool = False) -> None:
    """Prints progress as lines; with `quiet` only warnings, on standard error, since standard output holds JSON."""
    if quiet:
        print_log_lines(logging.WARNING, to=error_console)
    else:
        print_log_lines()
