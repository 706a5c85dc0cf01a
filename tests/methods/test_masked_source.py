"""A checkpoint with a stored mask as the source of a run: the run keeps the mask; its baseline and its teacher have none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.commands.train import baseline_recipe
from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.recipe.compose import compose_recipe, save_recipe
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.run_folder import RunFolder
from tests.conftest import SPARSIFY, TOKENIZER, Command, Setup
from tests.methods.conftest import Calibrate
from tests.runtime.blocks import IDS

pytestmark = pytest.mark.xdist_group("masked_source")
PERCENTILE: dict[str, Any] = {"method": "percentile", "target_zeros": 0.5}


def run_command(*line: object) -> str:
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def masked(mixture_file: Path, stock: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "mixtral"
    method = ["--method", "percentile", "--target-zeros", 0.5, "--calibration-tokens", 2048]
    run_command(*SPARSIFY, "convert", stock["mixtral"], "--to", folder, *method, "--calibrate-on", mixture_file)
    return folder


@pytest.fixture(scope="module")
def run(masked: Path, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "run"
    settings = ["activation=swiglu", "baseline.ffn_activation=swiglu", "distillation.logits_weight=0.1"]
    settings += [f"model.source={masked}", "training.budget_tokens=1024", "tracking.wandb=disabled"]
    run_command(*command(Setup("mixtral", 2, 1, "fp32"), folder), *settings)
    return folder


def thresholds(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.endswith("threshold")}


def test_a_converted_mixtral_trains_on_under_its_mask(run: Path, masked: Path) -> None:
    before, after = load_sparse(masked), load_sparse(run / "export")
    assert after.config.sparsification == before.config.sparsification
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    stored = thresholds(masked)
    assert len(stored) == 2
    assert all(torch.equal(threshold, thresholds(run / "export")[name]) for name, threshold in stored.items())
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["product_zeros"] == pytest.approx(0.5, abs=0.05)


def test_its_baseline_is_the_dense_model(run: Path, stock: dict[str, Path]) -> None:
    baseline = load_sparse(run / "baseline" / "initial")
    assert baseline.config.sparsification is None
    assert torch.equal(baseline(IDS).logits, load_sparse(stock["mixtral"])(IDS).logits)
    stages = json.loads((run / "report" / "report.json").read_text())["stages"]
    zeros = {stage["name"]: stage["zeros"] for stage in stages}
    assert list(zeros) == ["masked swiglu base", "after training", "dense baseline, same tokens"]
    assert zeros["masked swiglu base"] == pytest.approx(0.5, abs=0.05)
    assert zeros["dense baseline, same tokens"] == 0
    assert not RunFolder(run).is_dense
    assert RunFolder(run / "baseline").is_dense


def test_its_teacher_is_the_dense_model(run: Path, stock: dict[str, Path]) -> None:
    assert torch.equal(load_sparse(run / "teacher")(IDS).logits, load_sparse(stock["mixtral"])(IDS).logits)
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    first = next(line for line in lines if line["kind"] == "train")
    assert first["distillation"]["logits"] > 1e-4


def test_a_run_repeats_its_baseline_only_without_a_mask(tmp_path: Path) -> None:
    recipe = compose_recipe("quickstart", ["activation=swiglu", "conversion=bare"])
    run = RunFolder(tmp_path)
    save_recipe(recipe, run.recipe)
    write_json(run.initial / "config.json", {"sparsification": None})
    assert run.is_dense
    assert baseline_recipe(recipe, run) is None
    write_json(run.initial / "config.json", {"sparsification": {"method": "percentile", "sites": {}}})
    assert not run.is_dense
    baseline = baseline_recipe(recipe, run)
    assert baseline is not None
    assert baseline.conversion.drop_source_mask


@pytest.mark.parametrize(("kind", "method"), [("mistral", "la_rosa"), ("mixtral", "la_rosa"), ("mixtral", "wina")])
def test_without_its_mask_a_rotated_model_is_the_dense_one(
    kind: str, method: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"method_settings": {"transform": True}} if method == "wina" else {}
    found = calibrate(kind, "swiglu", tmp_path / "masked", tokens=640, method=method, target_zeros=0.5, **settings)
    source = ModelSection(source=str(found.folder))
    convert(source, ActivationSection("swiglu"), tmp_path / "plain", seed=0, dtype=torch.float32, drop_mask=True)
    plain, dense = load_sparse(tmp_path / "plain"), load_sparse(stock[kind])
    assert plain.config.sparsification is None
    torch.testing.assert_close(plain(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-4)


def test_the_mask_is_left_out_of_every_shard(calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path) -> None:
    dense = load_sparse(stock["mistral"])
    dense.config.architectures = None
    dense.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    config = json.loads((stock["mistral"] / "config.json").read_text())
    write_json(tmp_path / "sharded" / "config.json", config)
    copy_tokenizer(TOKENIZER, tmp_path / "sharded")
    found = calibrate(str(tmp_path / "sharded"), "swiglu", tmp_path / "masked", tokens=640, **PERCENTILE)
    assert len(list(found.folder.glob("*.safetensors"))) > 1

    activation, source = ActivationSection("swiglu"), ModelSection(source=str(found.folder))
    convert(source, activation, tmp_path / "plain", seed=0, dtype=torch.float32, drop_mask=True)
    plain = load_sparse(tmp_path / "plain")
    assert plain.config.sparsification is None
    assert torch.equal(plain(IDS).logits, dense(IDS).logits)
    with pytest.raises(ModelError, match=r"drop_source_mask=true would be ignored: .* stores no mask"):
        convert(
            ModelSection(source=str(tmp_path / "plain")),
            activation,
            tmp_path / "again",
            seed=0,
            dtype=torch.float32,
            drop_mask=True,
        )
    assert not (tmp_path / "again").exists()


def test_a_mask_gives_way_to_another_only_when_asked(calibrate: Calibrate, tmp_path: Path) -> None:
    first = calibrate("mistral", "swiglu", tmp_path / "first", tokens=640, **PERCENTILE)
    wanted = PERCENTILE | {"target_zeros": 0.3}
    with pytest.raises(ModelError, match="stores a mask already, of percentile") as refused:
        calibrate(str(first.folder), "swiglu", tmp_path / "second", tokens=640, **wanted)
    assert "conversion.drop_source_mask=true" in str(refused.value)
    calibrate(str(first.folder), "swiglu", tmp_path / "second", tokens=640, **wanted, drop_source_mask=True)
    calibrate("mistral", "swiglu", tmp_path / "straight", tokens=640, **wanted)
    again, straight = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "straight"))
    assert all(torch.equal(again[name], straight[name]) for name in straight)
    assert again.keys() == straight.keys()
