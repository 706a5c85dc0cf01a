"""What a command says while it works: this package's log records, printed as plain lines."""

from __future__ import annotations

import logging

from rich.console import Console

from sparsify.reporting.terminal import PlainConsole

console = PlainConsole()
"""Standard output, as it is when a line is printed. What draws a progress bar there draws it on this console."""
error_console = PlainConsole(stderr=True)


class LineHandler(logging.Handler):
    """Prints the message of a record as it is: no level, no time, no markup. Warnings are red."""

    def __init__(self, to: Console) -> None:
        super().__init__()
        self._console = to

    def emit(self, record: logging.LogRecord) -> None:
        style = "red" if record.levelno >= logging.WARNING else None
        try:
            self._console.print(self.format(record), style=style, soft_wrap=True)
        except Exception:
            self.handleError(record)


def print_log_lines(level: int = logging.INFO, *, to: Console = console) -> None:
    """Prints what this package logs in this process from `level` on, instead of what was said before."""
    logger = logging.getLogger("sparsify")
    logger.setLevel(level)
    for handler in [one for one in logger.handlers if isinstance(one, LineHandler)]:
        logger.removeHandler(handler)
    logger.addHandler(LineHandler(to))
