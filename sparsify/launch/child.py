"""Child processes: how they are started, watched and stopped, and how their errors reach the parent.

A child that fails writes its error into a file next to its log. The parent raises a `UserError` again with its class and its fields;
of a defect it raises a `RuntimeError` with the child's traceback.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Literal

from sparsify.errors import RunError, UserError
from sparsify.files import storage_errors, write_json
from sparsify.launch import lifeline

DONE = 0
FAILED = 1
USER_ERROR = 2
INTERRUPTED = 130
LOG_TAIL_LINES = 30
ERROR_FILE = "SPARSIFY_ERROR_FILE"
"""Environment variable of a child: the file for its error."""


class Interrupted(Exception):
    """The run was interrupted and has saved its state."""


class Child:
    """A process in a session of its own, so that the terminal's Ctrl-C reaches it only through its parent.

    Args:
        environment: Its environment; this process's own unless given.
        kept_open: Open files that it keeps open with this process: locks that must outlive this process.
        output: Where its standard output goes: into the log, to this process's own, or into the pipe `stdout`.

    Raises:
        StorageError: If the log cannot be written.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        kept_open: Sequence[int] = (),
        output: Literal["log", "terminal", "pipe"] = "log",
    ) -> None:
        self.name, self.log = name, log
        self._error_file = log.with_suffix(".error.json").absolute()
        inherited = os.environ if environment is None else environment
        with storage_errors(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            self._error_file.unlink(missing_ok=True)
            file = log.open("w")
        with file:
            self._process = subprocess.Popen(
                command,
                env={**inherited, ERROR_FILE: str(self._error_file)},
                stdin=subprocess.DEVNULL,
                stdout={"log": file, "terminal": None, "pipe": subprocess.PIPE}[output],
                stderr=file,
                text=True,
                start_new_session=True,
                pass_fds=kept_open,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def stdout(self) -> IO[str]:
        """Its standard output, where that is a pipe."""
        assert self._process.stdout is not None
        return self._process.stdout

    def poll(self) -> int | None:
        """Its exit code, below 0 the signal that killed it; None while it runs."""
        return self._process.poll()

    def wait(self) -> int:
        return self._process.wait()

    def request_stop(self) -> None:
        """Sends SIGTERM; the child saves what it has and ends."""
        self._process.terminate()

    def kill(self) -> None:
        """Ends it at once, with its own children."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def join(self, grace_seconds: float) -> None:
        """Waits for its end; kills it after `grace_seconds`."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace_seconds)
        self.kill()

    def log_tail(self) -> str:
        return _last_lines(self.log.read_text(errors="replace"))

    def failure_time(self) -> float:
        """When it failed, in seconds since the epoch; where it could not record that, when it last wrote into its log."""
        return self._record().get("time") or self.log.stat().st_mtime

    def error(self, when: str = "") -> Exception:
        """What it failed with, to be raised here.

        Returns:
            The `UserError` that it raised, or one that names the signal that killed it, or a `RuntimeError` with its
            traceback, or with the end of its log.
        """
        record, code = self._record(), self.poll()
        if "class" in record:
            return UserError.from_json(record)
        if code == USER_ERROR:  # it could not write the file
            return UserError(self.log_tail())
        what = record.get("traceback") or self.log_tail()
        if code is not None and code < 0:
            return killed(self.name, code, when)
        where = " ".join(part for part in (f"exit code {code}", when) if part)
        return RuntimeError(f"{self.name} failed with {where} (whole log: {self.log}):\n{what}")

    def _record(self) -> dict[str, Any]:
        try:
            return json.loads(self._error_file.read_text())
        except (OSError, ValueError):
            return {}


def killed(name: str, code: int, when: str = "") -> RunError:
    """The error of a process that a signal killed, whose exit code is below 0."""
    signal_name = signal.Signals(-code).name
    said = " ".join(part for part in (f"{name[:1].upper()}{name[1:]} was killed by {signal_name}", when) if part)
    return RunError(
        f"{said}.", next_step=f"{_CAUSES.get(signal_name, '')}The same command continues from what was saved."
    )


_CAUSES = {
    "SIGKILL": "SIGKILL often means that memory ran out. ",
    "SIGBUS": "SIGBUS means that a file could not be read from its disk, or became shorter while it was read. ",
}


def module_command(module: ModuleType, *arguments: str) -> list[str]:
    """The command of a module's program, which ends with this process."""
    assert module.__spec__ is not None
    return [sys.executable, "-m", *lifeline_arguments(module.__spec__.name), *arguments]


def lifeline_arguments(program: str) -> list[str]:
    assert lifeline.__spec__ is not None
    return [lifeline.__spec__.name, str(os.getpid()), program]


def run_child(work: Callable[[], bool]) -> int:
    """Runs what a child is for; its error goes into its log and to its parent.

    Args:
        work: Returns False if a stop was requested before its end.
    """
    error_file = os.environ.pop(ERROR_FILE, None)  # not for its own children
    try:
        return DONE if work() else INTERRUPTED
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        code, record = USER_ERROR, error.to_json()
    except Exception:
        traceback.print_exc()
        code, record = FAILED, {"traceback": _last_lines(traceback.format_exc())}
    if error_file is not None:
        with suppress(OSError, UserError):  # a full disk: the parent reads the log
            write_json(Path(error_file), {**record, "time": time.time()})
    return code


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


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
