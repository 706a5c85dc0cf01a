"""Runs with Liger's kernels, in Triton's interpreter, have the losses of plain ones, and go on to the same bits."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from sparsify.recipe.recipe import Recipe
from sparsify.training.kernels.liger_ops import installed_version
from tests.conftest import Command, Setup
from tests.ranks import prepare_run, records, run_ranks
from tests.triton import interpreter_environment

PROGRAM = Path(__file__).with_name("liger_program.py")
STEPS, STEP_TOKENS = 2, 4 * 8
SETTINGS = {
    # The interpreter takes some 50 ms for each token of a step.
    "training.sequence_length": 8,
    "training.global_batch_size": 4,
    "training.micro_batch_size": 1,
    "training.budget_tokens": STEPS * STEP_TOKENS,
    "training.gradient_checkpointing": True,
    "training.liger_kernels": True,
    "distillation.ffn_weight": 0.5,
    "optimizer.warmup_tokens": STEP_TOKENS,
    "checkpoint.every_tokens": STEP_TOKENS,
    "checkpoint.keep_every_tokens": STEP_TOKENS,
    "eval.every_tokens": STEPS * STEP_TOKENS,
}


def figures(run: Path) -> list[tuple[float, ...]]:
    """Loss, gradient norm and error from the teacher of every step, and the loss of every validation."""
    return [
        (line["loss"], line["gradient_norm"], line["distillation"]["ffn"])
        if line["kind"] == "train"
        else (line["loss"],)
        for line in records(run)
        if line["kind"] in ("train", "validation")
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)  # nine minutes where eight others share two cores
@pytest.mark.skipif(installed_version() is None, reason="no liger-kernel")
def test_liger_runs_have_the_losses_of_plain_ones_and_go_on_to_the_same_bits(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in interpreter_environment().items():
        monkeypatch.setenv(name, value)
    alone = tmp_path / "alone"
    settings = [f"{key}={value}" for key, value in SETTINGS.items()]
    arguments = command(Setup("mixtral", 2, 1, "fp32"), alone) + settings
    said = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    assert f"Liger {installed_version()} computes" in said.stdout + said.stderr
    # Liger's norms round differently from the exported code's: 2.7e-07 on one processor, 0 on another.
    assert re.search(
        r"logits (equal the trained|differ from the trained model's by \d\.\de-(0[6-9]|\d\d) )", said.stdout
    )
    packages = json.loads((alone / "environment.json").read_text())["packages"]
    assert packages["liger-kernel"] == installed_version()

    def change(recipe: Recipe) -> None:
        recipe.engine.zero_stage = 3
        recipe.training.liger_kernels = Path(recipe.run_dir).name != "plain"

    runs = {name: tmp_path / name for name in ("plain", "straight", "stopped")}
    for run in runs.values():
        prepare_run(alone, run, change)
    run_ranks(PROGRAM, [word for name, run in runs.items() for word in (str(run), name)])
    plain = figures(runs["plain"])
    assert [len(line) for line in plain] == [1, 1, *[3] * STEPS, 1]
    for run in (alone, runs["straight"]):
        for found, wanted in zip(figures(run), plain, strict=True):
            assert found == pytest.approx(wanted, rel=1e-4)
    assert figures(runs["stopped"]) == figures(runs["straight"]) != plain
