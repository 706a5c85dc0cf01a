"""A run that begins with the calibrated replacement: thresholds inside fused experts, under ZeRO-3 in bf16, to the export."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from tests.conftest import Command, Setup

pytestmark = pytest.mark.xdist_group("calibrated")
SETTINGS = [
    "conversion.calibration_tokens=2048",
    "conversion.target_zeros=0.8",
    "training.budget_tokens=1024",
    "distillation.logits_weight=0.2",
    "distillation.ffn_weight=0.2",
]


@pytest.fixture(scope="module")
def run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    line = command(Setup("mixtral", 3, 1, "bf16"), folder)
    result = subprocess.run([*line, *SETTINGS], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Layer 2 of 2: relative error" in result.stdout
    return folder


def test_the_base_and_the_calibrated_start_are_both_on_record(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [line for line in map(json.loads, lines) if line["kind"] == "validation"]
    stages = {stage["name"]: stage for stage in read(run / "initial" / "calibration.json")}
    base, after = records[0], records[1]
    assert (base["label"], after["label"]) == ("base", "after_replacement")
    assert base["sources"] == stages["dense"]["losses"]
    # The live model, in bf16, on the sequences that the calibration watched in fp32.
    assert after["sources"] == pytest.approx(stages["refit"]["losses"], rel=5e-3)
    assert records[-1]["zeros"] == pytest.approx(0.8, abs=0.07)


def test_thresholds_are_trained_around_and_exported(run: Path) -> None:
    initial, bundle = load_sparse(run / "initial"), load_sparse(run / "export")
    assert bundle.config.sparsification["method"] == "thresholds"
    for before, after in zip(initial.ffn_blocks(), bundle.ffn_blocks(), strict=True):
        stored = before.ffn_activation.threshold.bfloat16()  # fp32, as the stock checkpoint is
        assert torch.equal(stored, after.ffn_activation.threshold)
        assert (after.ffn_activation.threshold > 0).any()
        assert not torch.equal(before.down_proj.bfloat16(), after.down_proj)
    assert (run / "export" / "training" / "calibration.json").is_file()


def test_the_teacher_is_the_source_and_not_what_was_fitted(run: Path, stock: dict) -> None:
    teacher, source = load_sparse(run / "teacher"), load_sparse(stock["mixtral"])
    fitted = load_sparse(run / "initial")
    assert teacher.config.ffn_activation == "swiglu"
    assert not teacher.config.sparsification
    for (name, own), other in zip(teacher.named_parameters(), source.parameters(), strict=True):
        assert torch.equal(own, other), name
    assert not torch.equal(teacher.ffn_blocks()[0].down_proj, fitted.ffn_blocks()[0].down_proj)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    distilled = [line["distillation"] for line in lines if line["kind"] == "train"]
    assert all(0 < one["logits"] < 1 for one in distilled)
    assert all(0.01 < one["ffn"] < 1 for one in distilled)


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text())["stages"]
