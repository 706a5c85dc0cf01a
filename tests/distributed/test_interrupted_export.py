"""An export that is terminated or killed while its check runs, and a finished run whose export was damaged since."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from sparsify.runs.run_lock import RunLock
from tests.conftest import SPARSIFY, Command, Setup

pytestmark = pytest.mark.slow
SETUP = Setup("mistral", 2, 2, "bf16")
START_SECONDS = 120


def checks_of(folder: Path) -> list[psutil.Process]:
    """Processes that check a bundle of this folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        command = " ".join(process.info["cmdline"] or [])
        if "fresh_process" in command and any(str(folder) in place for place in _requests(command)):
            found.append(process)
    return found


def _requests(command: str) -> list[str]:
    return [
        Path(word).read_text() for word in command.split() if word.endswith("request.json") and Path(word).is_file()
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_process_and_the_next_one_cleans_up(
    number: signal.Signals, finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path
) -> None:
    run, _ = finished(SETUP)
    command = [*SPARSIFY, "export", str(run), "--to", str(tmp_path / "bundle")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + START_SECONDS
    while not (checks := checks_of(tmp_path)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    psutil.wait_procs(checks, timeout=5)
    assert not [check for check in checks if check.is_running()]
    left = [path.name for path in tmp_path.iterdir()]
    if number == signal.SIGTERM:
        assert (process.returncode, said.splitlines()[-1], left) == (130, "Interrupted.", [])
    else:
        assert [name.startswith(".bundle.partial-") for name in left] == [True]
        subprocess.run([*command, "--unchecked"], check=True, capture_output=True)
        assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_finished_run_with_a_flipped_bit_is_exported_again(
    command: Command, finished: Callable[[Setup], tuple[Path, dict]], tmp_path: Path
) -> None:
    whole, printed = finished(SETUP)
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    shard = run / "export" / "model.safetensors"
    right = shard.read_bytes()
    shard.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    (run / ".report.partial-7").mkdir()
    asked = command(SETUP, run)
    with RunLock(run):
        refused = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "Another process is training" in refused.stderr
    again = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "is not as it was written: changed model.safetensors. It is written again." in again.stdout + again.stderr
    assert shard.read_bytes() == right
    assert not list(run.glob(".*.partial-*"))
    assert json.loads(again.stdout[again.stdout.index("\n{") :])["export"] == printed["export"]
