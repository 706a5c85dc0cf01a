"""A child's end, as its parent sees it."""

from __future__ import annotations

import dataclasses
import json
import signal
import time
from pathlib import Path

import pytest

from sparsify.errors import ExportError, MixtureError, RunError, UserError
from sparsify.launch.child import FAILED, INTERRUPTED, USER_ERROR, Child, module_command
from sparsify.launch.launcher import Failure
from tests.launch import child_program


def start(deed: str, folder: Path) -> Child:
    command = module_command(child_program, deed)
    return Child("the program", command, folder / "logs" / "child.log", output="pipe")


def test_a_mistake_is_the_same_error_in_the_parent(tmp_path: Path) -> None:
    child = start("mistake", tmp_path)
    assert child.wait() == USER_ERROR
    error = child.error()
    assert type(error) is MixtureError
    assert (error.given, error.allowed, error.next_step) == (
        "text.jsonl is empty.",
        "Some text.",
        "Add text.",
    )
    assert abs(time.time() - child.failure_time()) < 60
    assert "text.jsonl is empty." in child.log_tail()


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    child = start("defect", tmp_path)
    assert child.wait() == FAILED
    error = child.error("after step 3")
    assert type(error) is RuntimeError
    message = str(error)
    assert message.startswith("the program failed with exit code 1 after step 3 (whole log: ")
    assert "in main" in message
    assert message.endswith("LookupError: no such neuron")


def test_a_child_that_was_killed_is_named_with_the_signal_and_not_an_earlier_error(tmp_path: Path) -> None:
    start("mistake", tmp_path).wait()
    child = start("deaf", tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.kill()
    assert child.poll() == -signal.SIGKILL
    error = child.error("after step 3")
    assert type(error) is RunError
    assert error.given == "The program was killed by SIGKILL after step 3."
    assert "memory" in error.next_step


def test_a_child_that_stops_in_time_is_not_killed(tmp_path: Path) -> None:
    child = start("wait", tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.request_stop()
    child.join(60)
    assert child.poll() == INTERRUPTED


def test_a_child_that_does_not_stop_is_killed_after_its_grace(tmp_path: Path) -> None:
    child = start("deaf", tmp_path)
    assert child.stdout.readline() == "ready\n"
    child.request_stop()
    child.join(0.2)
    assert child.poll() == -signal.SIGKILL


def test_work_that_is_done_leaves_no_error(tmp_path: Path) -> None:
    child = start("done", tmp_path)
    assert child.wait() == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["child.log"]


@pytest.mark.parametrize("kind", [UserError, RunError, ExportError])
def test_a_failure_on_another_node_is_the_same_error_here(kind: type[UserError]) -> None:
    error = kind("given", allowed="allowed", next_step="next")
    sent = json.dumps(dataclasses.asdict(Failure(3, USER_ERROR, 1.5, error.to_json())))
    received = Failure(**json.loads(sent)).exception()
    assert type(received) is kind
    assert vars(received) == vars(error)
