"""Dense checkpoint → dReLU → DeepSpeed ZeRO → report → export, with real processes, for Mistral and Mixtral."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import STEPS, Command, Setup

FAST = [("mistral", 2), ("mixtral", 3)]
SLOW = [("mistral", 1), ("mistral", 3), ("mixtral", 1), ("mixtral", 2)]
START_SECONDS = 240
STOP_ATTEMPTS = 3


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run: Path) -> list[tuple[int, float, float | None]]:
    train = [line for line in lines(run / "metrics.jsonl") if line["kind"] == "train"]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in train]


def weights_hash(run: Path) -> str:
    return hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("kind", "stage"),
    [*FAST, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)],
)
def test_two_processes_go_all_the_way(kind: str, stage: int, finished: Callable[[Setup], tuple[Path, dict]]) -> None:
    run, printed = finished(Setup(kind, stage, 2, "bf16"))
    steps = losses(run)
    assert [step for step, _, _ in steps] == list(range(1, STEPS + 1))
    names = [stage["name"] for stage in printed["stages"]]
    assert names == ["dense base", "right after the activation replacement", "after training"]
    base, swapped, trained = (stage["loss"] for stage in printed["stages"])
    assert trained < min(swapped, base)
    assert 0.6 < printed["zeros"] < 0.9
    assert "logits equal the trained model's" in printed["export"]
    for name in (
        "report/index.html",
        "report/per_layer.csv",
        "export/SHA256SUMS",
        "mixture.lock.json",
    ):
        assert (run / name).is_file(), name
    samples = lines(run / "samples.jsonl")
    assert [line["step"] for line in samples] == [2, 4, 6, 8]
    assert [pair["prompt"] for pair in samples[0]["samples"]] == ["code"]
    assert all(pair["continuation"] for line in samples for pair in line["samples"])
    train = [line for line in lines(run / "metrics.jsonl") if line["kind"] == "train"]
    assert all(line["flops_per_second"] > 0 and line["memory_bytes"] > 1e8 for line in train)
    assert all(0 <= line["data_share"] < 1 for line in train)
    assert train[-1]["left_seconds"] == 0
    assert all(0.6 < line["zeros"] < 0.9 for line in train)  # counted while it trains
    sparsity = lines(run / "sparsity.jsonl")
    assert [line["step"] for line in sparsity] == [0, 0, 4, 8]
    assert len(sparsity[-1]["layers"]) == 2


@pytest.mark.slow
def test_stages_agree_on_every_loss(finished: Callable[[Setup], tuple[Path, dict]]) -> None:
    for kind in ("mistral", "mixtral"):
        curves = [losses(finished(Setup(kind, stage, 2, "bf16"))[0]) for stage in (1, 2, 3)]
        for other in curves[1:]:
            for (_, loss, _), (_, expected, _) in zip(other, curves[0], strict=True):
                assert loss == pytest.approx(expected, rel=2e-3)


def test_one_and_two_processes_see_the_same_global_batches(
    finished: Callable[[Setup], tuple[Path, dict]],
) -> None:
    one, _ = finished(Setup("mistral", 1, 1, "fp32"))
    two, _ = finished(Setup("mistral", 1, 2, "fp32"))
    for (_, loss, norm), (_, other_loss, other_norm) in zip(losses(one), losses(two), strict=True):
        assert loss == pytest.approx(other_loss, rel=1e-5)
        assert norm == pytest.approx(other_norm, rel=1e-4)
    assert (one / "mixture.lock.json").read_text() == (two / "mixture.lock.json").read_text()


@pytest.mark.parametrize(
    ("setup", "signal_number", "exit_code"),
    [
        (Setup("mistral", 1, 1, "fp32"), signal.SIGINT, 130),
        pytest.param(
            *(Setup("mixtral", 3, 2, "bf16"), signal.SIGKILL, -signal.SIGKILL),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mistral-zero1-interrupted", "mixtral-zero3-killed"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    setup: Setup,
    signal_number: signal.Signals,
    exit_code: int,
    command: Command,
    finished: Callable[[Setup], tuple[Path, dict]],
    tmp_path: Path,
) -> None:
    straight, _ = finished(setup)
    run = tmp_path / "run"
    arguments = command(setup, run)
    for _ in range(STOP_ATTEMPTS):  # a busy machine may look too late
        if stopped_half_way(arguments, run, signal_number, exit_code):
            break
        shutil.rmtree(run)
    else:
        pytest.fail("it was stopped too late to prove anything")

    result = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Continuing from step" in result.stdout
    assert losses(run) == losses(straight)
    assert weights_hash(run) == weights_hash(straight)


def stopped_half_way(arguments: list[str], run: Path, signal_number: signal.Signals, exit_code: int) -> bool:
    """Stops a run after its first checkpoint. Returns whether it had not come to its end by then."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    while not (run / "checkpoints" / "latest").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal_number)
    ended = process.wait(START_SECONDS)
    if (run / "checkpoints" / "latest").read_text() == f"step-{STEPS:08d}\n":
        return False
    assert ended == exit_code
    return True


def test_the_second_command_finds_everything_done(
    command: Command, finished: Callable[[Setup], tuple[Path, dict]]
) -> None:
    setup = Setup("mistral", 1, 1, "fp32")
    run, printed = finished(setup)
    before = {path: path.stat().st_mtime_ns for path in (run / "export").rglob("*")}
    result = subprocess.run(command(setup, run), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Trained already" in result.stdout
    assert json.loads(result.stdout[result.stdout.index("\n{") :]) == printed
    assert {path: path.stat().st_mtime_ns for path in (run / "export").rglob("*")} == before
