"""What the processes of a run have in common: how they end, and how they say why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from sparsify.errors import UserError

INTERRUPTED = 130
USER_ERROR = 2
WATCH_SECONDS = 0.5
LOG_TAIL_LINES = 30
_START, _END = "<<user error>>", "<</user error>>"


class StopRequest:
    """Remembers that SIGTERM or SIGINT came; the work looks at it where it can stop."""

    def __init__(self) -> None:
        self.came = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, *_: object) -> None:
        self.came = True

    def __call__(self) -> bool:
        return self.came


def exit_with_launcher(*, whole_group: bool = False) -> None:
    """Ends this process soon after its launcher is gone, so that no orphan writes into a run that is started again.

    Args:
        whole_group: End its process group with it, for one that has workers of its own.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(WATCH_SECONDS)
        if whole_group:
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tell_user_error(error: UserError) -> int:
    """Leaves the message in this process's log, where the launcher finds it; returns the exit code."""
    print(f"{_START}{error}{_END}", file=sys.stderr, flush=True)
    return USER_ERROR


def log_tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])


def raise_user_error(log: Path) -> NoReturn:
    """Raises what a process left in its log with `tell_user_error`."""
    tail = log_tail(log)
    message = tail.rpartition(_START)[2].partition(_END)[0].strip()
    raise UserError(message or tail)
