"""No process outlives the one that started it, and no run has two writers, whenever the launcher dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sparsify.errors import RunError
from sparsify.launch import lifeline
from sparsify.runs.run_lock import LOCK_FILE, RunLock

MOMENTS = (0.0, 0.02, 0.1, 0.5)
"""Seconds after the child was started: before it runs Python, while it starts, and while it is busy."""


def ended(pid: int, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


def test_a_child_ends_with_its_launcher_at_every_moment_of_its_start(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.launch.starter"]
    starters = [
        subprocess.Popen(
            [*command, str(tmp_path / str(number)), str(tmp_path / f"{number}.lines")], stdout=subprocess.PIPE
        )
        for number in range(len(MOMENTS))
    ]
    for number, (starter, moment) in enumerate(zip(starters, MOMENTS, strict=True)):
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        time.sleep(moment)
        if moment == MOMENTS[-1]:
            with pytest.raises(RunError, match=f"process {starter.pid} on"), RunLock(tmp_path / str(number)):
                pass
        starter.kill()
        starter.wait()
        with RunLock(tmp_path / str(number)):  # free as soon as the child has ended, and not before
            assert ended(pid, 0.1), moment
        lines = tmp_path / f"{number}.lines"
        written = lines.read_bytes() if lines.exists() else b""
        time.sleep(0.05)
        assert (lines.read_bytes() if lines.exists() else b"") == written


def test_a_program_whose_parent_is_gone_before_it_runs_does_nothing(tmp_path: Path) -> None:
    """The parent that it is told of is not the one it has."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    program = tmp_path / "program.py"
    program.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    command = [sys.executable, "-I", lifeline.__file__, str(gone.pid), str(program)]
    assert subprocess.run(command, check=False, start_new_session=True).returncode == -signal.SIGKILL
    assert not (tmp_path / "ran").exists()


def test_the_lock_of_a_process_that_is_gone_is_free(tmp_path: Path) -> None:
    with RunLock(tmp_path), RunLock(tmp_path) as again:  # shared within a process
        assert os.get_inheritable(again.descriptor) is False
    assert str(os.getpid()) in (tmp_path / LOCK_FILE).read_text()
    with RunLock(tmp_path):
        pass
