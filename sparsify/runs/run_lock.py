"""The lock of a run folder: one writer at a time, which says who it is.

The kernel keeps the lock until the last process that holds it has ended: the launcher, and its ranks, which inherit it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Self

from sparsify.errors import RunError
from sparsify.files import refuse_dangling, storage_errors
from sparsify.runs.run_folder import POLL_SECONDS

LOCK_FILE = ".lock"
WAIT_SECONDS = 2.0
"""Ranks outlive a killed launcher by less than this."""


_held: dict[Path, tuple[int, int]] = {}
"""The open file and the number of holders of each lock of this process."""


class RunLock:
    """Context manager that holds the lock of a run folder, which it makes. One that this process holds is shared.

    Raises:
        RunError: If another process writes into the run, naming it.
        StorageError: If the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, folder.resolve()

    @property
    def descriptor(self) -> int:
        """The open file that holds the lock."""
        return _held[self._key][0]

    def __enter__(self) -> Self:
        if self._key in _held:
            descriptor, times = _held[self._key]
            _held[self._key] = descriptor, times + 1
            return self
        refuse_dangling(self._folder)
        with storage_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            self._acquire(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        _held[self._key] = descriptor, 1
        return self

    def __exit__(self, *_: object) -> None:
        descriptor, times = _held.pop(self._key)
        if times > 1:
            _held[self._key] = descriptor, times - 1
        else:
            os.close(descriptor)

    def _acquire(self, descriptor: int) -> None:
        deadline = time.monotonic() + WAIT_SECONDS
        while True:
            try:
                with storage_errors(self._folder / LOCK_FILE):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RunError(
                        f"Another process is training {self._folder}: {_said(descriptor)}.",
                        next_step="Wait for it, stop it, or choose another folder with run_dir=….",
                    ) from error
                time.sleep(POLL_SECONDS)
        me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        text = json.dumps(me | {"command": " ".join(["sparsify", *sys.argv[1:]])})
        with storage_errors(self._folder / LOCK_FILE):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, text.encode(errors="replace"), 0)


def _said(descriptor: int) -> str:
    try:
        one = json.loads(os.pread(descriptor, 1 << 16, 0))
        pid, host, since = int(one["pid"]), str(one["host"]), str(one["since"])
    except (OSError, ValueError, TypeError, KeyError):
        return "it has not said which"
    gone = host == socket.gethostname() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists()
    what = f"process {pid} on {host}, since {since}"
    return f"{what}; that one is gone, and its ranks have not ended yet" if gone else what
