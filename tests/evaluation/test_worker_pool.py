"""Several processes give the result of one, resume what another number began, and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import EvaluationError
from sparsify.evaluation import worker_pool
from sparsify.evaluation.evaluate import EvalSettings, evaluate
from sparsify.evaluation.held_out_perplexity import HeldOut
from sparsify.evaluation.results import EvaluationResults, read_items
from sparsify.evaluation.subject import Subject
from sparsify.evaluation.suite import load_suite
from sparsify.evaluation.tasks import task_sources
from tests.conftest import SPARSIFY
from tests.evaluation.test_predictors import random_predictors, sequences

SUITE = """name: own
tasks:
  arc_easy: {shots: 1}
  gsm8k: {shots: 1, metric: exact_match, limit: 3}
  wikitext2: {metric: token_perplexity}
prompts: [Once, There]
prompt_tokens: 6
"""


@pytest.fixture
def measure(stock: dict[str, Path], data_dir: Path, tmp_path: Path):
    suite_file = tmp_path / "own.yaml"
    suite_file.write_text(SUITE)
    suite = load_suite(str(suite_file))
    model = load_sparse(stock["mistral_tied"], "drelu")
    tokenizer = load_tokenizer(stock["mistral_tied"])
    masks = ("predictors", random_predictors(model, 0.5))

    def run(name: str, processes: int, masked: bool = False, **more) -> EvaluationResults:
        return evaluate(
            Subject(model, tokenizer, "small", predictors=masks if masked else None),
            suite,
            task_sources(suite, data_dir),
            HeldOut("own", sequences(3)),
            tmp_path / name,
            EvalSettings(batch_size=2, processes=processes),  # small batches make several chunks
            **more,
        )

    return run


def test_two_processes_give_the_bits_of_one(measure, tmp_path: Path) -> None:
    one, two = measure("one", 1, masked=True), measure("two", 2, masked=True)
    assert one.samples == two.samples
    for task, same in zip(one.tasks, two.tasks, strict=True):
        assert same.model_dump(exclude={"seconds"}) == task.model_dump(exclude={"seconds"})
        assert read_items(tmp_path / "two", task.name) == read_items(tmp_path / "one", task.name)
    assert (one.processes, two.processes) == (1, 2)


@pytest.mark.slow
def test_one_process_resumes_what_two_began(measure, tmp_path: Path) -> None:
    whole = measure("whole", 1)

    def stop(task: str):
        def at(done: int, _total: int) -> None:
            if task == "arc_easy" and done >= 16:
                raise KeyboardInterrupt

        return at

    with pytest.raises(KeyboardInterrupt):
        measure("cut", 2, on_progress=stop)
    done_counts: list[int] = []

    def first(task: str):
        return lambda done, _total: done_counts.append(done) if task == "arc_easy" else None

    rest = measure("cut", 1, on_progress=first)
    assert done_counts[0] >= 16
    for task, same in zip(whole.tasks, rest.tasks, strict=True):
        assert same.model_dump(exclude={"seconds"}) == task.model_dump(exclude={"seconds"})


def test_a_model_that_shared_memory_cannot_hold_is_refused(measure, monkeypatch: pytest.MonkeyPatch) -> None:
    full = worker_pool.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(worker_pool.shutil, "disk_usage", lambda _: full)
    with pytest.raises(EvaluationError, match="--shm-size"):
        measure("out", 2)


@pytest.mark.slow
@pytest.mark.parametrize("signalled", ["group", "first", "worker"])
def test_ctrl_c_and_kills_leave_no_process(signalled: str, stock: dict[str, Path], tmp_path: Path) -> None:
    """Ctrl-C reaches all processes; `kill -9` of the first is not signalled to the others; a worker may be killed for its memory."""
    suite = tmp_path / "own.yaml"
    suite.write_text("name: own\ntasks: {python_functions: {shots: 4}}\n")
    command = [*SPARSIFY, "evaluate", str(stock["mistral"])]
    command += ["--suite", str(suite), "--to", str(tmp_path / "out"), "--processes", "2"]
    launched = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    journal = tmp_path / "out" / "journal" / "python_functions.loglikelihood.jsonl"
    while not journal.is_file() or journal.stat().st_size < 1000:
        assert launched.poll() is None, launched.stdout.read()  # type: ignore[union-attr]
        time.sleep(0.05)
    children = _workers_of(launched.pid)
    assert len(children) == 2
    if signalled == "group":
        os.killpg(launched.pid, signal.SIGINT)
    elif signalled == "first":
        launched.kill()
    else:
        os.kill(children[0], signal.SIGKILL)
    out, _ = launched.communicate(timeout=30)
    expected = {"group": 130, "first": -signal.SIGKILL, "worker": 2}
    assert launched.returncode == expected[signalled], out
    assert ("--processes" in out) == (signalled == "worker")
    deadline = time.monotonic() + 10
    while any(_runs(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _workers_of(parent: int) -> list[int]:
    found = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in found}
    return [child for child, command in commands.items() if b"spawn_main" in command]


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
