"""Whole checkpoints and damaged ones, on files alone; test_kills.py and test_resizing.py have the processes."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.manifest import MANIFEST, damage
from sparsify.errors import RunError
from sparsify.runs.state import TrainingState, crosses, latest_checkpoint
from sparsify.training.checkpoints import Keep, newest_whole, save

pytestmark = pytest.mark.usefixtures("one_rank")

SHARD = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


class Engine:
    """Writes files as an engine does."""

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        (Path(folder) / tag / SHARD).write_bytes(tag.encode() * 1000)
        (Path(folder) / tag / "mp_rank_00_model_states.pt").write_bytes(b"weights" * 1000)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Checkpoints after 2, 4, 6 steps of 10 tokens."""
    save_steps(tmp_path, [2, 4, 6], Keep(3, None, 10))
    return tmp_path


def save_steps(folder: Path, steps: list[int], keep: Keep) -> None:
    for step in steps:
        save(Engine(), TrainingState(step, 10 * step, 1, 1, {"code": step}), folder, keep, {})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def cut_off(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-7])


def flip_a_bit(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[3000] ^= 1
    shard.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut_off, rf"{SHARD} has [\d,]+ bytes instead of [\d,]+"),
    "one bit flipped": (flip_a_bit, f"the content of {SHARD} is not what was written"),
    "a shard gone": (Path.unlink, f"{SHARD} is missing"),
    "no manifest": (lambda shard: (shard.parent / MANIFEST).unlink(), f"{MANIFEST} is missing"),
    "half a manifest": (lambda shard: cut_off(shard.parent / MANIFEST), f"{MANIFEST} is not"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    what: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    harm, reason = DAMAGES[what]
    harm(saved / "step-00000006" / SHARD)
    assert newest_whole(saved) == saved / "step-00000004"
    assert (saved / "latest").read_text() == "step-00000004\n"
    (warning,) = caplog.messages
    expected = f"Checkpoint step-00000006 is damaged: {reason}.*Continuing from step-00000004"
    assert re.search(expected, warning)


def test_whole_checkpoints_are_used_without_a_word(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    assert newest_whole(saved) == saved / "step-00000006"
    assert newest_whole(saved / "none") is None
    assert caplog.messages == []


def test_no_whole_checkpoint_at_all_is_an_error_that_names_each(saved: Path) -> None:
    for step in (2, 4, 6):
        cut_off(saved / f"step-{step:08d}" / SHARD)
    with pytest.raises(RunError) as error:
        newest_whole(saved)
    message = str(error.value)
    assert all(f"step-{step:08d}: {SHARD} has" in message for step in (2, 4, 6))
    assert f"remove {saved} to train from the beginning" in message


NO_LATEST: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda latest: latest.write_text(""),
    "garbage": lambda latest: latest.write_bytes(b"\xff\xfe"),
    "a folder": lambda latest: (latest.unlink(), latest.mkdir(), (latest / "own.txt").write_text("mine")),
    "a name of none": lambda latest: latest.write_text("initial\n"),
}


@pytest.mark.parametrize("what", NO_LATEST)
def test_without_latest_the_newest_whole_checkpoint_is_used_and_said(
    what: str, saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    NO_LATEST[what](saved / "latest")
    flip_a_bit(saved / "step-00000006" / SHARD)
    assert latest_checkpoint(saved) == saved / "step-00000006"
    assert newest_whole(saved) == saved / "step-00000004"
    assert (saved / "latest").read_text() == "step-00000004\n"
    assert "Continuing from step-00000004, the newest whole checkpoint." in caplog.messages
    assert what != "a folder" or [path.read_text() for path in saved.glob("latest.*/own.txt")] == ["mine"]


def test_checkpoints_without_latest_and_none_whole_are_an_error(saved: Path) -> None:
    (saved / "latest").unlink()
    for step in (2, 4, 6):
        cut_off(saved / f"step-{step:08d}" / SHARD)
    with pytest.raises(RunError, match=f"step-00000002: {SHARD} has"):
        newest_whole(saved)


def test_a_checkpoint_that_is_not_there_is_passed_over_for_any_that_is(saved: Path) -> None:
    (saved / "latest").write_text("step-00000001\n")
    assert newest_whole(saved) == saved / "step-00000006"


def test_folders_of_others_stay(saved: Path) -> None:
    for name in ("step-5000", "step-00000003", "step-best"):
        (saved / name).mkdir()
        (saved / name / "model.bin").write_text("mine")
    save_steps(saved, [8], Keep(1, None, 10))
    assert names(saved) == ["latest", "step-00000003", "step-00000008", "step-5000", "step-best"]


def test_the_manifest_holds_every_file_with_its_size(saved: Path) -> None:
    folder = saved / "step-00000006"
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted([*files, MANIFEST]) == names(folder)
    assert all((folder / name).stat().st_size == entry["size_bytes"] for name, entry in files.items())
    assert damage(folder) is None


def test_a_state_that_is_no_state_is_damage(saved: Path) -> None:
    folder = saved / "step-00000006"
    state = asdict(TrainingState(6, 60, 1, 1, {}))
    del state["step"]
    (folder / "state.json").write_text(json.dumps(state))
    entry = json.loads((folder / MANIFEST).read_text())
    assert damage(folder) is not None
    del entry["files"]["state.json"]
    (folder / MANIFEST).write_text(json.dumps(entry))
    assert newest_whole(saved) == saved / "step-00000004"


def test_leftovers_of_a_killed_run_go_with_the_next_save(tmp_path: Path) -> None:
    for leftover in (".partial-step-00000008", ".step-00000002.replaced-7", "step-00000001"):
        (tmp_path / leftover).mkdir()
    save_steps(tmp_path, [2], Keep(2, None, 10))
    assert names(tmp_path) == ["latest", "step-00000002"]


def test_saving_the_same_step_again_replaces_it(saved: Path) -> None:
    cut_off(saved / "step-00000006" / SHARD)
    save_steps(saved, [6], Keep(2, None, 10))
    assert names(saved) == ["latest", "step-00000004", "step-00000006"]
    assert newest_whole(saved) == saved / "step-00000006"


def test_milestones_stay_beside_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, [2, 4, 6, 8, 10, 12, 13], Keep(2, 40, 10))
    kept = [name for name in names(tmp_path) if name.startswith("step")]
    assert kept == [f"step-{step:08d}" for step in (4, 8, 12, 13)]


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 6))
def test_milestones_are_among_what_is_saved(step_tokens: int, every: int, multiple: int) -> None:
    seen = [step * step_tokens for step in range(1, 80)]
    saved = {tokens for tokens in seen if crosses(every, tokens, step_tokens)}
    assert {tokens for tokens in seen if crosses(every * multiple, tokens, step_tokens)} <= saved
