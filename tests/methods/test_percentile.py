"""Percentile thresholds: the wanted zeros on text that took no part, through convert, training, export and decoding."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.export.check import accept
from sparsify.methods.base import method_of
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import ConversionSection
from sparsify.runs.load import load
from sparsify.runtime import accelerate
from sparsify.sparsity.probe import SparsityProbe
from tests.conftest import SPARSIFY, Command, Setup
from tests.methods.conftest import Calibrate, Calibrated, killed_after, measured
from tests.ranks import prepare_run, records, run_ranks
from tests.runtime.blocks import IDS, decoded_logits

OBJECTIVE_PROGRAM = Path(__file__).with_name("objective_program.py")
KINDS = ("mistral", "mixtral")
kinds = pytest.mark.parametrize("kind", KINDS)


def thresholds_of(model: SparseModel) -> list[torch.Tensor]:
    return [buffer for name, buffer in model.named_buffers() if name.endswith("threshold")]


@pytest.fixture(scope="module")
def masked(
    calibrate: Calibrate, compiled: None, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Calibrated]:
    """Both kinds of model, with half of the products and with half of the gates masked."""
    root = tmp_path_factory.mktemp("percentile")
    return {
        (kind, site): calibrate(
            kind,
            "swiglu",
            root / f"{kind}-{site}",
            method="percentile",
            target_zeros=0.5,
            method_settings={"site": site},
        )
        for kind in KINDS
        for site in ("inter", "gate")
    }


@kinds
@pytest.mark.parametrize("site", ["inter", "gate"])
def test_held_out_text_has_the_wanted_zeros(
    kind: str, site: str, masked: dict[tuple[str, str], Calibrated], stock: dict[str, Path]
) -> None:
    found = masked[kind, site]
    assert [stage.name for stage in found.calibration.stages] == ["dense", "percentile"]
    model = load_sparse(found.folder)
    loss, zeros = measured(model, found)
    assert zeros == pytest.approx(0.5, abs=0.03)
    stage = found.calibration.stages[-1]
    assert (stage.loss, stage.zeros) == pytest.approx((loss, zeros), abs=2e-3)
    assert all(threshold.shape == (1,) for threshold in thresholds_of(model))
    # Nothing but the thresholds is new.
    before = load_sparse(stock[kind]).state_dict()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(IDS)
    assert (probe.statistics().zero_share("gate") > 0.3) == (site == "gate")


@kinds
def test_a_share_of_0_is_the_dense_model_bit_by_bit(
    kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(kind, "swiglu", tmp_path / "out", tokens=640, method="percentile", target_zeros=0.0)
    model = load_sparse(found.folder)
    assert torch.equal(model(IDS).logits, load_sparse(stock[kind])(IDS).logits)
    assert all((threshold == -torch.inf).all() for threshold in thresholds_of(model))


def test_layers_with_enough_zeros_get_the_threshold_0(calibrate: Calibrate, tmp_path: Path) -> None:
    found = calibrate("mistral", "drelu", tmp_path / "out", tokens=640, method="percentile", target_zeros=0.3)
    assert [layer["inter_threshold"] for layer in found.calibration.layers] == [0.0, 0.0]
    assert found.calibration.stages[-1].zeros > 0.6


def test_a_reconstruction_may_follow(calibrate: Calibrate, tmp_path: Path) -> None:
    found = calibrate("mistral", "swiglu", tmp_path / "out", method="percentile", target_zeros=0.9, refit=True)
    stages = {stage.name: stage for stage in found.calibration.stages}
    assert list(stages) == ["dense", "percentile", "refit"]
    experts = [expert for layer in found.calibration.layers for expert in layer["experts"]]
    assert all(each["error_refitted"] < each["error_before"] for each in experts)
    loss, zeros = measured(load_sparse(found.folder), found)
    assert loss == pytest.approx(stages["refit"].loss, abs=2e-4)
    assert zeros == pytest.approx(0.9, abs=0.03)


def test_a_killed_conversion_resumes_to_the_same_thresholds(
    calibrate: Calibrate,
    masked: dict[tuple[str, str], Calibrated],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {"method": "percentile", "target_zeros": 0.5, "method_settings": {"site": "inter"}}
    caplog.set_level(logging.INFO, "sparsify")
    with killed_after("Layer 1"):
        calibrate("mixtral", "swiglu", tmp_path / "out", **settings)
    caplog.clear()
    again = calibrate("mixtral", "swiglu", tmp_path / "out", **settings)
    assert "Layer 1" not in caplog.text
    assert "Layer 2 of 2" in caplog.text
    whole = masked["mixtral", "inter"]
    assert again.calibration == whole.calibration
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again.folder, whole.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@kinds
@pytest.mark.parametrize("site", ["inter", "gate"])
def test_accelerated_decoding_says_the_same_and_reads_less(
    kind: str, site: str, masked: dict[tuple[str, str], Calibrated]
) -> None:
    model = load_sparse(masked[kind, site].folder)
    expected = decoded_logits(model)
    acceleration = accelerate(model)
    torch.testing.assert_close(decoded_logits(model), expected, rtol=1e-4, atol=1e-5)
    for reads in acceleration.reads if acceleration.backend == "native" else ():
        assert reads.rows.gate == reads.offered
        assert 0.2 < reads.rows.down / reads.offered < 0.8
        if site == "gate":
            assert reads.rows.up == reads.rows.down
        else:
            assert reads.rows.up == reads.offered


@kinds
def test_a_fresh_process_gives_the_same_logits(
    kind: str, masked: dict[tuple[str, str], Calibrated], tmp_path: Path
) -> None:
    folder = masked[kind, "gate"].folder
    with torch.no_grad():
        logits = load_sparse(folder)(IDS).logits.contiguous()
    save_file({"input_ids": IDS, "logits": logits}, tmp_path / "reference.safetensors")
    accepted = accept(folder, "swiglu", ["fp32"], tmp_path / "reference.safetensors")
    assert accepted.logits_difference is not None
    assert accepted.logits_difference < 1e-6


def test_training_keeps_the_mask_to_the_export_and_a_command_decodes_it(command: Command, tmp_path: Path) -> None:
    """test_masked_source.py trains a mixture of experts under such a mask."""
    run = tmp_path / "run"
    line = [
        *command(Setup("mistral", 1, 1, "fp32"), run),
        "activation=swiglu",
        "conversion.method=percentile",
        "conversion.calibration_tokens=2048",
        "conversion.target_zeros=0.5",
        "training.budget_tokens=1024",
        "tracking.wandb=disabled",
    ]
    result = subprocess.run(line, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    initial, bundle = load_sparse(run / "initial"), load_sparse(run / "export")
    assert bundle.config.sparsification == initial.config.sparsification
    assert bundle.config.sparsification["method"] == "percentile"
    assert all(map(torch.equal, thresholds_of(initial), thresholds_of(bundle)))
    assert not torch.equal(initial.lm_head.weight, bundle.lm_head.weight)
    report = json.loads((run / "report" / "report.json").read_text())
    assert report["masks"] == {"inter": "layer"}
    assert report["product_zeros"] == pytest.approx(0.5, abs=0.1)
    generate = [*SPARSIFY, "generate", str(run / "export")]
    result = subprocess.run(
        [*generate, "code 1", "--tokens", "4", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = json.loads(result.stdout)
    assert said["backend"] != "dense"


def test_an_interrupted_training_under_a_mask_ends_with_the_same_bits(
    masked: dict[tuple[str, str], Calibrated],
    finished: Callable[[Setup], tuple[Path, dict]],
    tmp_path: Path,
) -> None:
    """The dense kind on its product, fused experts on their gates; each straight through, and stopped after a sixth."""
    whole, _ = finished(Setup("mistral", 1, 1, "fp32"))
    starts = {"mistral": masked["mistral", "inter"].folder, "mixtral": masked["mixtral", "gate"].folder}
    cases = [f"{kind}-{way}" for kind in starts for way in ("straight", "cut")]
    for case in cases:
        kind = case.partition("-")[0]
        run = prepare_run(whole, tmp_path / case, partial(_twelve_steps, stage={"mistral": 1, "mixtral": 3}[kind]))
        shutil.rmtree(run.initial)
        shutil.copytree(starts[kind], run.initial)
    run_ranks(OBJECTIVE_PROGRAM, [str(tmp_path / case) for case in cases])
    for kind, start in starts.items():
        straight, cut = (records(tmp_path / f"{kind}-{way}") for way in ("straight", "cut"))
        assert [line["step"] for line in cut if line["kind"] == "checkpoint"] == [2, 12]
        for key in ("step", "loss", "gradient_norm"):
            assert [line[key] for line in cut if line["kind"] == "train"] == [
                line[key] for line in straight if line["kind"] == "train"
            ]
        models = [load(str(tmp_path / f"{kind}-{way}")).model for way in ("straight", "cut")]
        ours, theirs = (model.state_dict() for model in models)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        before = load_sparse(start)
        assert not torch.equal(before.lm_head.weight, models[0].lm_head.weight)
        assert all(map(torch.equal, thresholds_of(before), thresholds_of(models[0])))


def _twelve_steps(recipe: Recipe, stage: int) -> None:
    recipe.activation.ffn_activation, recipe.engine.zero_stage = "swiglu", stage
    recipe.checkpoint.every_tokens = 1_000_000
    recipe.training.budget_tokens = recipe.eval.every_tokens = 12 * recipe.step_tokens


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "percentile needs conversion.target_zeros"),
        ({"target_zeros": 0.5, "method_settings": {"site": "up"}}, "'inter' or 'gate'"),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(method="percentile", **settings))
