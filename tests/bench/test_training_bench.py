"""`bench train` compares loops that do the same work; its numbers are consistent."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sparsify.bench.timing import InterleavedLoop, run_interleaved
from sparsify.bench.training_report import TrainBench, training_table
from sparsify.cli import main
from tests.conftest import SPARSIFY

BLOCKS, BLOCK_STEPS = 2, 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bench(recipe_file: Path, mixture_file: Path, tmp_path_factory: pytest.TempPathFactory):
    arguments = [str(recipe_file), f"mixture={mixture_file}"]
    arguments += [f"cache_dir={tmp_path_factory.mktemp('cache')}"]
    arguments += ["--blocks", str(BLOCKS), "--block-steps", str(BLOCK_STEPS), "--json"]
    done = subprocess.run(
        [*SPARSIFY, "bench", "train", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return TrainBench.model_validate_json(done.stdout)


def test_all_loops_train_the_same_model_on_the_same_sequences(bench: TrainBench) -> None:
    assert len(bench.ours.losses) >= BLOCKS * BLOCK_STEPS
    for other in (bench.bare, bench.trainer):
        assert len(other.losses) >= BLOCKS * BLOCK_STEPS
        for ours, theirs in zip(bench.ours.losses, other.losses, strict=False):
            assert ours == pytest.approx(theirs, rel=1e-3)


def test_every_loop_was_timed_block_by_block_and_is_shown(bench: TrainBench) -> None:
    for loop in (bench.bare, bench.ours, bench.trainer):
        assert len(loop.step_seconds) == BLOCKS
        # A step is over before the process is, and takes longer than its launch.
        assert all(1e-4 < seconds < 100 for seconds in loop.step_seconds)
    assert (bench.probe.every_tokens, bench.probe.held_out_tokens) == (1536, 3 * 3 * 64)
    with main.console.capture() as shown:
        main.console.print(training_table(bench))
    for loop in (bench.bare, bench.ours, bench.trainer):
        assert f"{loop.tokens_per_second:,.0f}" in shown.get()


def test_only_one_loop_runs_at_a_time_and_each_gets_its_blocks() -> None:
    trace: list[str] = []

    def loop(control: InterleavedLoop) -> None:
        while True:
            control.step()
            trace.append(control.name)

    controls = run_interleaved({"one": loop, "two": loop}, block_steps=3, blocks=4, on_progress=lambda _: None)
    assert [len(control.seconds) for control in controls.values()] == [4, 4]
    assert [trace.count(name) for name in controls] == [15, 15]
    blocks = [trace[start : start + 3] for start in range(0, len(trace), 3)]
    assert all(len(set(block)) == 1 for block in blocks)


def test_an_error_of_a_loop_is_raised() -> None:
    def broken(control: InterleavedLoop) -> None:
        control.step()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_interleaved({"broken": broken}, block_steps=1, blocks=1, on_progress=lambda _: None)
