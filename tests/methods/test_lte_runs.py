"""Both stages of LTE in real runs of two ranks: the same under every ZeRO stage, frozen routers, and interrupted over the boundary."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sparsify.conversion.convert import convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ActivationSection, GroupRoutingSection
from sparsify.runs.load import load
from tests.conftest import SPARSIFY, Command, Setup
from tests.methods.test_objective_runs import PROGRAM, lines
from tests.models.test_group_router import routed
from tests.models.test_masking import save
from tests.ranks import prepare_run, records, run_ranks

pytestmark = pytest.mark.xdist_group("gentle")

STEPS, SOFT = 12, 4
"""Whole runs; the folder with `cut` is stopped after two steps, inside stage 1, and goes on into stage 2."""
CASES = ["mistral-1", "mistral-3", "mistral-cut-1", "mixtral-2", "mixtral-3"]
OTHER_STAGES = ["mistral-0", "mistral-2", "mixtral-1", "mistral-cut-3", "mistral-bf16-2", "mistral-bf16-cut-2"]
Runs = Callable[[list[str]], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def runs(finished: Callable[[Setup], tuple[Path, dict]], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Trains cases one after another in the same two processes; returns their metrics."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))

    def train(cases: list[str]) -> dict[str, list[dict[str, Any]]]:
        root = tmp_path_factory.mktemp("routed")
        for case in cases:
            run = prepare_run(whole, root / case, partial(_change, case=case))
            kind = case.partition("-")[0]
            source = root / f"{case}-source"
            source.mkdir()
            save(routed(kind), source)
            shutil.rmtree(run.initial)
            convert(
                ModelSection(source=str(source)), ActivationSection("swiglu"), run.initial, seed=0, dtype=torch.float32
            )
        run_ranks(PROGRAM, [str(root / case) for case in cases])
        return {case: [*records(root / case), {"kind": "folder", "path": root / case}] for case in cases}

    return train


def _change(recipe: Recipe, case: str) -> None:
    recipe.activation = ActivationSection("swiglu")
    recipe.training.budget_tokens = STEPS * recipe.step_tokens
    recipe.engine.zero_stage = int(case[-1])
    recipe.training.count_zeros = False
    if "bf16" in case:
        recipe.training.precision = "bf16"
    recipe.checkpoint.every_tokens = recipe.checkpoint.keep_every_tokens = SOFT * recipe.step_tokens
    recipe.eval.every_tokens = 2 * recipe.step_tokens
    recipe.group_routing = GroupRoutingSection(
        soft_tokens=SOFT * recipe.step_tokens,
        active_share=0.3,
        learning_rate_factor=3.0,
    )


@pytest.fixture(scope="module")
def measured(runs: Runs) -> dict[str, list[dict[str, Any]]]:
    return runs(CASES)


def _check_equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for a, b in zip(lines(one, "train"), lines(other, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        for key in ("active_share", "undecided", "efficiency_weight", "added"):
            assert a["group_routing"].get(key) == pytest.approx(b["group_routing"].get(key), rel=0.02, abs=2e-3), key


def test_both_stages_are_the_same_under_every_zero_stage(measured: dict[str, Any]) -> None:
    _check_equal(measured["mistral-1"], measured["mistral-3"])
    _check_equal(measured["mixtral-2"], measured["mixtral-3"])


@pytest.mark.slow
def test_other_zero_stages_do_the_same(measured: dict[str, Any], runs: Runs) -> None:
    others = runs(OTHER_STAGES)
    for case in ("mistral-0", "mistral-2"):
        _check_equal(measured["mistral-1"], others[case])
    _check_equal(measured["mixtral-2"], others["mixtral-1"])
    for whole, cut in (
        (measured["mistral-3"], others["mistral-cut-3"]),
        (others["mistral-bf16-2"], others["mistral-bf16-cut-2"]),
    ):
        _check_same(whole, cut)
    _check_frozen(others["mistral-bf16-2"])


def _check_same(whole: list[dict[str, Any]], cut: list[dict[str, Any]]) -> None:
    for key in ("step", "loss", "gradient_norm", "group_routing"):
        assert [line[key] for line in lines(whole, "train")] == [line[key] for line in lines(cut, "train")], key


def test_an_interruption_in_the_first_stage_changes_no_bit_of_either(measured: dict[str, Any]) -> None:
    _check_same(measured["mistral-1"], measured["mistral-cut-1"])
    ends = [_weights(measured[case], STEPS) for case in ("mistral-1", "mistral-cut-1")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def _weights(run: list[dict[str, Any]], step: int) -> dict[str, torch.Tensor]:
    (folder,) = lines(run, "folder")
    return load(str(folder["path"] / "checkpoints" / f"step-{step:08d}")).model.state_dict()


@pytest.mark.parametrize("case", ["mistral-1", "mistral-3", "mixtral-3"])
def test_routers_learn_in_the_first_stage_and_are_frozen_to_the_bit_in_the_second(
    measured: dict[str, Any], case: str
) -> None:
    _check_frozen(measured[case])


def _check_frozen(run: list[dict[str, Any]]) -> None:
    (folder,) = lines(run, "folder")
    initial = {}
    for file in (folder["path"] / "initial").glob("*.safetensors"):
        initial |= load_file(file)
    boundary, end = _weights(run, SOFT), _weights(run, STEPS)
    for name in (name for name in end if ".group_router." in name):
        assert torch.equal(boundary[name], end[name]), name
        start = initial[name.replace(".mlp.", ".block_sparse_moe.") if name not in initial else name]
        assert torch.equal(start, end[name]) == name.endswith("threshold"), name
    down = next(name for name in end if name.endswith(("down_proj.weight", "down_proj")))
    assert not torch.equal(boundary[down], end[down])


def test_the_log_says_which_stage_it_is_and_what_the_routers_do(measured: dict[str, Any]) -> None:
    train, validation = (lines(measured["mistral-1"], kind) for kind in ("train", "validation"))
    routing = [line["group_routing"] for line in train]
    assert [one["stage"] for one in routing] == ["soft"] * SOFT + ["hard"] * (STEPS - SOFT)
    assert routing[0]["efficiency_weight"] == 0.0
    assert routing[1]["efficiency_weight"] > 0
    assert "added" not in routing[SOFT]
    for one in routing:
        assert one["active_share"] == pytest.approx(sum(one["active"]) / 2, abs=1e-4)
        assert 0 <= one["undecided"] <= 1
    labels = {line["tokens"]: line["label"] for line in validation if line["tokens"]}
    tokens = sorted(labels)
    assert [labels[one] for one in tokens] == ["soft routing", *["training"] * (len(tokens) - 1)]
    # Soft groups make no zeros; hard ones do.
    zeros = {line["tokens"]: line["zeros"] for line in validation}
    assert zeros[tokens[0]] < 0.01 < zeros[tokens[-1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_command_converts_trains_reports_exports_and_decodes(kind: str, command: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = [
        *command(Setup(kind, 2, 2, "bf16"), run),
        "activation=swiglu",
        "conversion.method=lte",
        "+conversion.method_settings.group_size=8",
        "conversion.calibration_tokens=2048",
        "group_routing.soft_tokens=2048",
        "group_routing.active_share=0.5",
        "group_routing.learning_rate_factor=10",
        "training.count_zeros=false",
        "tracking.wandb=disabled",
        "baseline.ffn_activation=swiglu",
    ]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    initial, bundle = load_sparse(run / "initial"), load_sparse(run / "export")
    assert bundle.config.sparsification == initial.config.sparsification
    report = json.loads((run / "report" / "report.json").read_text())
    assert len(report["routers"]) == 2
    assert report["site_zeros"]["group"] == pytest.approx(report["product_zeros"], abs=1e-3)
    generate = [*SPARSIFY, "generate", str(run / "export"), "code 1", "--tokens", "4"]
    result = subprocess.run(generate, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_checkpoint_saved_in_the_first_stage_is_what_it_will_be_loaded_as(measured: dict[str, Any]) -> None:
    (folder,) = lines(measured["mistral-cut-1"], "folder")
    checkpoint = min((folder["path"] / "checkpoints").glob("step-*"))
    loaded, reference = load(str(checkpoint)), load_file(checkpoint / "reference.safetensors")
    with torch.no_grad():
        logits = loaded.model(reference["input_ids"], use_cache=False).logits
    torch.testing.assert_close(logits, reference["logits"])
