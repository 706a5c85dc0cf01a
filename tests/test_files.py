"""Folders that are written whole or not at all, and what is left of those that were not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsify.files import atomic_folder, clear_partial_files, clear_remains

WRITER = """
import sys, time
from pathlib import Path
from sparsify.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> subprocess.Popen[str]:
    """A process that writes the folder `report` and never ends by itself."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "report")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_attempt_and_what_a_living_one_writes_stays(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    (left,) = names(tmp_path)
    assert left.startswith(".report.partial-")
    for name in (".other.partial-1", ".report.partial-mine"):
        (tmp_path / name).mkdir()
    clear_remains(tmp_path / "report")
    assert left in names(tmp_path)
    writer.kill()
    writer.wait()
    with atomic_folder(tmp_path / "report") as folder:
        (folder / "whole").write_text("whole")
    assert names(tmp_path) == [".other.partial-1", ".report.partial-mine", "report"]
    assert names(tmp_path / "report") == ["whole"]


def test_a_folder_that_was_lost_between_two_renames_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".report.replaced-7").mkdir()
    (tmp_path / ".report.replaced-7" / "old").write_text("old")
    clear_remains(tmp_path / "report")
    assert names(tmp_path) == ["report"]
    (tmp_path / ".report.replaced-8").mkdir()
    clear_remains(tmp_path / "report")
    assert names(tmp_path) == ["report"]


def test_halves_of_files_go_and_other_hidden_files_stay(tmp_path: Path) -> None:
    for name in (".recipe.yaml.partial-12", ".notes.partial-mine", ".lock"):
        (tmp_path / name).write_text("")
    clear_partial_files(tmp_path)
    assert names(tmp_path) == [".lock", ".notes.partial-mine"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    fsync, rename = os.fsync, Path.rename

    def watched_sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def watched_rename(path: Path, to: Path) -> Path:
        if to.name == "model":
            assert {file.stat().st_ino for file in [path, *path.rglob("*")]} <= synced
        return rename(path, to)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "training").mkdir()
        (folder / "training" / "state.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(b"weights")
    assert tmp_path.stat().st_ino in synced, "the name itself"


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_command_that_is_terminated_leaves_nothing_and_says_so(number: signal.Signals, tmp_path: Path) -> None:
    program = (
        "import sys\nfrom sparsify.cli import main as cli\n@cli.app.command()\ndef write(to: str) -> None:\n"
        f"    sys.argv = ['', to]\n    exec({WRITER!r}, {{}})\n"
        f"sys.argv = ['sparsify', 'write', {str(tmp_path / 'report')!r}]\ncli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    started = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (130, "Interrupted.\n")
    assert names(tmp_path) == []
    assert time.monotonic() - started < 10
