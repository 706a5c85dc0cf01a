"""A run that makes weights sparse: its baseline, report, model card, export and comparison; and a run that adds zeros to its result."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.commands.run import check_dense_source
from sparsify.compare.comparison_tables import tables
from sparsify.compare.runs import compare
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.weight_zeros import TensorReader, lost_zeros, weight_sparsity
from sparsify.errors import ExportError, RecipeError
from sparsify.export.bundle import export
from sparsify.export.check import verify
from sparsify.plan import make_plan
from sparsify.recipe.compose import compose_recipe
from sparsify.runs.run_folder import RunFolder
from tests.conftest import Command, Setup
from tests.ranks import records
from tests.runtime.blocks import IDS

SPARSE = [
    "activation=swiglu",
    "baseline.ffn_activation=swiglu",
    "conversion.method=sparsegpt",
    "conversion.weight_sparsity=0.5",
    "conversion.calibration_tokens=2048",
    "distillation.squarehead_weight=1",
    "training.budget_tokens=1024",
    "eval.report_curve_tokens=0",
    "tracking.wandb=disabled",
]

pytestmark = pytest.mark.xdist_group("sparse_weights")


def run_command(*line: object) -> str:
    result = subprocess.run([*map(str, line)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse") / "run"
    run_command(*command(Setup("mistral", 1, 1, "fp32"), folder), *SPARSE)
    return folder


@pytest.mark.slow
def test_its_baseline_and_its_teacher_are_dense(run: Path, stock: dict[str, Path]) -> None:
    dense = load_sparse(stock["mistral"])(IDS).logits
    for folder in (run / "baseline" / "initial", run / "teacher"):
        assert torch.equal(load_sparse(folder)(IDS).logits, dense)
    assert not RunFolder(run).is_dense
    assert RunFolder(run / "baseline").is_dense
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["kind"] == "train")
    assert first["distillation"]["squarehead"] > 0.01


@pytest.mark.slow
def test_its_report_says_which_weights_are_zero_and_what_that_saves(run: Path) -> None:
    found = json.loads((run / "report" / "report.json").read_text())["weight_zeros"]
    assert (found["method"], found["sparsity"], len(found["matrices"])) == ("sparsegpt", 0.5, 14)
    assert found["zeros"] == pytest.approx(0.5, abs=0.005)
    # 2 layers of 2·32·(32 + 16) + 3·32·64 weights, of two bytes.
    assert found["dense_bytes"] == 2 * 2 * (2 * 32 * 48 + 3 * 32 * 64)
    assert found["weight_bytes"] == pytest.approx(found["dense_bytes"] * (1 / 16 + 1 - found["zeros"]), abs=1)
    assert found["activation_bytes"] == found["dense_bytes"]
    page = (run / "report" / "index.html").read_text()
    assert "Sparse weights" in page
    assert "q_proj" in page


@pytest.mark.slow
def test_its_export_keeps_every_zero_and_verify_counts_them(run: Path, tmp_path: Path) -> None:
    config = load_sparse(run / "export").config
    assert lost_zeros(config, TensorReader(run / "initial"), TensorReader(run / "export")) == {}
    stored = weight_sparsity(config)
    assert stored is not None
    card = (run / "export" / "README.md").read_text()
    assert "**50% of the weights zero, by sparsegpt**" in card
    assert "weight-sparsity" in card
    checks = {check.name: check for check in verify(run / "export")}
    assert all(check.holds for check in checks.values()), checks
    assert "as at export" in checks["weight zeros"].found

    copy = shutil.copytree(run / "export", tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name].view(-1)[int((tensors[name].view(-1) == 0).nonzero()[0])] = 1e-6
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    broken = {check.name: check for check in verify(copy)}
    assert not broken["weight zeros"].holds


@pytest.mark.slow
def test_an_export_of_lost_zeros_is_refused(run: Path, tmp_path: Path) -> None:
    """What training would have stopped for is looked for once more when the result is given away."""
    copy = shutil.copytree(run, tmp_path / "run")
    tensors = load_file(copy / "initial" / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    kept = (tensors[name] != 0).nonzero()[3].tolist()
    tensors[name][kept[0], kept[1]] = 0.0
    save_file(tensors, copy / "initial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ExportError, match=f"1 weights that were zero where training began .* 1 in {name}"):
        export(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_comparison_shows_its_zero_weights_and_its_baseline(run: Path) -> None:
    comparison = compare([run, run / "baseline"])
    sparse = comparison.runs[0]
    assert sparse.weight_sparsity == 0.5
    assert sparse.baseline is not None
    table = next(table for table in tables(comparison) if table.title == "Runs")
    column = table.header.index("zero weights")  # type: ignore[union-attr]
    assert [str(row[column]) for row in table.rows] == ["50.0%", "0%"]


@pytest.mark.slow
def test_a_second_run_adds_zeros_to_the_result_of_the_first(
    run: Path, command: Command, stock: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "second"
    settings: list[Any] = [f"model.source={run / 'export'}", f"model.dense_source={stock['mistral']}"]
    settings += [one for one in SPARSE if "weight_sparsity" not in one] + ["conversion.weight_sparsity=0.7"]
    run_command(*command(Setup("mistral", 2, 2, "fp32"), folder), *settings)
    config = load_sparse(folder / "export").config
    assert weight_sparsity(config) == weight_sparsity({"weight_sparsity": config.weight_sparsity})
    assert lost_zeros(config, TensorReader(run / "export"), TensorReader(folder / "export")) == {}
    dense = load_sparse(stock["mistral"])(IDS).logits
    for other in (folder / "baseline" / "initial", folder / "teacher"):
        assert torch.equal(load_sparse(other)(IDS).logits, dense)
    assert compare([folder, folder / "baseline"]).runs[0].baseline is not None


@pytest.mark.slow
def test_zeros_hold_when_a_run_continues_with_other_processes_and_another_stage(
    command: Command, tmp_path: Path
) -> None:
    plain = [one for one in SPARSE if not one.startswith(("baseline", "distillation"))]
    run_command(*command(Setup("mixtral", 2, 2, "fp32"), tmp_path / "run"), *plain)
    longer = [*plain, "training.budget_tokens=2048"]
    run_command(*command(Setup("mixtral", 3, 1, "fp32"), tmp_path / "run"), *longer)
    folders = tmp_path / "run" / "initial", tmp_path / "run" / "export"
    config = load_sparse(folders[1]).config
    assert lost_zeros(config, *map(TensorReader, folders)) == {}
    assert sum(line["kind"] == "train" for line in records(tmp_path / "run")) == 4


def test_a_sparse_source_has_no_dense_baseline_unless_it_is_named(recipe_file: Path, tmp_path: Path) -> None:
    sparse = {"weight_sparsity": {"method": "sparsegpt", "pattern": "2:4", "sparsity": 0.5}}
    recipe = compose_recipe(str(recipe_file), ["baseline.ffn_activation=swiglu"])
    with pytest.raises(RecipeError, match=r"is not dense: 50% of the weights zero \(2:4\), by sparsegpt"):
        check_dense_source(recipe, sparse)
    check_dense_source(compose_recipe(str(recipe_file), []), sparse)
    (tmp_path / "config.json").write_text(json.dumps(sparse))
    recipe.model.dense_source = str(tmp_path)
    with pytest.raises(RecipeError, match=r"model\.dense_source=.* is not dense"):
        check_dense_source(recipe, sparse)


@pytest.mark.parametrize("name", ["sparse_llama", "sparse_llama_70", "quickstart_sparsegpt"])
def test_the_plan_knows_the_zeros_and_what_making_them_takes(name: str) -> None:
    recipe = compose_recipe(name)
    plan, share = make_plan(recipe), recipe.conversion.weight_sparsity
    assert share is not None
    parameters = plan.parameters
    projections = parameters.attention + parameters.gate + parameters.up + parameters.down
    assert plan.zero_weights == pytest.approx(share * projections, rel=1e-3)
    assert plan.calibration is not None
    assert plan.calibration.method == "sparsegpt"
    if "llama" in name:  # four float64 matrices of 11,008 inputs
        assert 3.8e9 < plan.calibration.memory_bytes < 12e9
