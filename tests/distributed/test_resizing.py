"""A run that goes on with another number of processes or another ZeRO stage has the losses of one that did not."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import STEPS, Command, Setup

Finished = Callable[[Setup], tuple[Path, dict]]
HALF = STEPS // 2


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def half_way(finished: Path, to: Path) -> Path:
    """The run as it stood at half its steps, if that had been its end."""
    shutil.copytree(finished, to, ignore=shutil.ignore_patterns("report", "export", "wandb"))
    shutil.rmtree(to / "checkpoints" / f"step-{STEPS:08d}")
    assert (to / "checkpoints" / f"step-{HALF:08d}").is_dir(), "nothing to go on from"
    (to / "checkpoints" / "latest").write_text(f"step-{HALF:08d}\n")
    return to


def go_on(command: Command, now: Setup, run: Path) -> str:
    result = subprocess.run(command(now, run), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


FAST = [(Setup("mistral", 2, 2, "bf16"), Setup("mistral", 2, 1, "bf16"))]
SLOW = [
    (Setup("mistral", 1, 1, "fp32"), Setup("mistral", 1, 2, "fp32")),
    (Setup("mistral", 1, 2, "bf16"), Setup("mistral", 2, 1, "bf16")),
    (Setup("mistral", 3, 2, "bf16"), Setup("mistral", 3, 1, "bf16")),
    (Setup("mistral", 3, 1, "fp32"), Setup("mistral", 3, 2, "fp32")),
    (Setup("mistral", 3, 2, "fp32"), Setup("mistral", 3, 1, "fp32")),
    (Setup("mixtral", 3, 2, "bf16"), Setup("mixtral", 3, 1, "bf16")),
    (Setup("mixtral", 1, 1, "fp32"), Setup("mixtral", 1, 2, "fp32")),
    (Setup("mistral", 0, 2, "fp32"), Setup("mistral", 0, 1, "fp32")),
    (Setup("mistral", 1, 1, "fp32"), Setup("mistral", 3, 2, "fp32")),
    (Setup("mistral", 2, 2, "bf16"), Setup("mistral", 3, 2, "bf16")),
    (Setup("mistral", 3, 1, "fp32"), Setup("mistral", 1, 1, "fp32")),
    (Setup("mixtral", 3, 2, "bf16"), Setup("mixtral", 2, 1, "bf16")),
    (Setup("mistral", 0, 1, "fp32"), Setup("mistral", 3, 1, "fp32")),
    (Setup("mistral", 1, 1, "fp32"), Setup("mistral", 0, 2, "fp32")),
]


@pytest.mark.parametrize(
    ("before", "now"),
    [*FAST, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)],
    ids=lambda setup: "-".join(map(str, setup)),
)
def test_losses_agree_with_the_uninterrupted_run(
    before: Setup, now: Setup, command: Command, finished: Finished, tmp_path: Path
) -> None:
    straight, _ = finished(before)
    run = half_way(straight, tmp_path / "run")
    for killed in ("", ".partial"):  # while it was converted, or while it was loaded
        (run / "checkpoints" / f".universal-step-{HALF:08d}{killed}" / "zero").mkdir(parents=True)
    said = go_on(command, now, run)
    if before.stage or now.stage:
        assert f"was saved by {before.processes} process(es) at ZeRO stage {before.stage}" in said
        assert f"this run has {now.processes} process(es) at ZeRO stage {now.stage}" in said
    assert losses(run)[:HALF] == losses(straight)[:HALF]
    # In bf16 two runs that differ in their number of processes drift apart by themselves.
    tolerance = 1e-3 if now.precision == "bf16" else 1e-5
    assert losses(run) == pytest.approx(losses(straight), rel=tolerance)
    state = json.loads((run / "checkpoints" / f"step-{STEPS:08d}" / "state.json").read_text())
    assert (state["processes"], state["zero_stage"]) == (now.processes, now.stage)
    assert not list((run / "checkpoints").glob(".*")), "the conversion was left behind"
