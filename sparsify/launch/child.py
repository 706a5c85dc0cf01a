"""What the processes of a run have in common: how they end, and how they say why."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from sparsify.errors import UserError

FAILED = 1
INTERRUPTED = 130
USER_ERROR = 2
WATCH_SECONDS = 0.5
LOG_TAIL_LINES = 30
_FAILED = "<<failed at>>"
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


def tell_failure() -> None:
    """Leaves the traceback of the error that is being handled in this process's log, with the time."""
    print(f"{_FAILED} {time.time()}", file=sys.stderr)
    traceback.print_exc()


def failure_time(log: Path) -> float:
    """When the process of a log failed, in seconds since the epoch; for one that could not say so, when it wrote last."""
    line = log.read_text(errors="replace").rpartition(f"{_FAILED} ")[2].partition("\n")[0]
    try:
        return float(line)
    except ValueError:
        return log.stat().st_mtime


def log_tail(log: Path) -> str:
    """The last lines of a log; from the error on, where the process told one."""
    said = log.read_text(errors="replace")
    _, told, error = said.rpartition(_FAILED)
    lines = (error.partition("\n")[2] if told else said).splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:])


def user_error(log: Path) -> UserError:
    """What a process left in its log with `tell_user_error`."""
    tail = log_tail(log)
    message = tail.rpartition(_START)[2].partition(_END)[0].strip()
    return UserError(message or tail)


def raise_user_error(log: Path) -> NoReturn:
    """Raises what a process left in its log with `tell_user_error`."""
    raise user_error(log)
