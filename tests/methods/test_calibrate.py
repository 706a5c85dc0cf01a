"""The calibrated replacement of whole checkpoints: what it reports is what a user gets, and a kill costs one layer at most."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import MixtureError, ModelError
from sparsify.methods.calibrated_checkpoint import read_calibration
from sparsify.models import SiteRule, site_rules
from tests.conftest import stock_model
from tests.methods.conftest import Calibrate, killed_after, measured


@pytest.mark.parametrize(
    ("kind", "activation", "target_zeros"),
    [("mistral", "drelu", None), ("mixtral", "drelu", 0.9), ("llama", "swiglu", 0.8)],
)
def test_every_stage_is_what_the_whole_model_would_measure(
    kind: str,
    activation: str,
    target_zeros: float | None,
    calibrate: Calibrate,
    stock: dict[str, Path],
    tmp_path: Path,
) -> None:
    found = calibrate(kind, activation, tmp_path / "out", target_zeros=target_zeros)
    stages = {stage.name: stage for stage in found.calibration.stages}
    wanted = ["dense", "bare replacement", "signs", "thresholds", "refit"]
    if activation != "drelu":
        wanted.remove("signs")
    if target_zeros is None:
        wanted.remove("thresholds")
    assert list(stages) == wanted
    models = {
        "dense": load_sparse(stock[kind]),
        "bare replacement": load_sparse(stock[kind], activation),
        "refit": load_sparse(found.folder),
    }
    for name, model in models.items():
        loss, zeros = measured(model, found)
        assert stages[name].loss == pytest.approx(loss, abs=2e-4), name
        if name != "dense":
            assert stages[name].zeros == pytest.approx(zeros, abs=2e-3), name
    sites = {} if target_zeros is None else {"inter": SiteRule("threshold", "channel")}
    assert site_rules(models["refit"].config) == sites
    if target_zeros is not None:
        assert stages["refit"].zeros == pytest.approx(target_zeros, abs=0.05)
    for layer in found.calibration.layers:
        for expert in layer["experts"]:
            if expert["kept_because"] is None:
                assert expert["error_refitted"] < expert["error_before"]
    calibration = read_calibration(found.folder)
    assert calibration is not None
    assert calibration.stages[-1].name == "refit"
    assert not list(tmp_path.glob(".*")), "the state is removed at the end"


def test_experts_with_few_tokens_are_named_and_keep_their_weights(
    calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    found = calibrate("mixtral", "reglu", tmp_path / "out", tokens=640)
    reasons = [expert["kept_because"] or "" for layer in found.calibration.layers for expert in layer["experts"]]
    few = [number for number, reason in enumerate(reasons) if "calibration tokens were routed to it" in reason]
    assert few
    assert f"expert {few[0] % 4} keeps its down projection: only" in caplog.text
    before = stock_model("mixtral").state_dict()
    after = load_sparse(found.folder).state_dict()
    for number, reason in enumerate(reasons):
        layer, expert = divmod(number, 4)
        name = f"model.layers.{layer}.mlp.experts.down_proj"
        assert torch.equal(before[name][expert], after[name][expert]) == bool(reason)


def test_a_killed_calibration_goes_on_where_it_stood(
    calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    whole = calibrate("mistral", "drelu", tmp_path / "whole", target_zeros=0.8)

    with killed_after("Layer 1"):
        calibrate("mistral", "drelu", tmp_path / "out", target_zeros=0.8)
    assert not (tmp_path / "out").exists()
    state = tmp_path / ".out.calibration"
    # What a kill in the middle of the next layer leaves behind is no obstacle.
    shutil.copytree(state / "streams-0001", state / "work")
    caplog.clear()
    again = calibrate("mistral", "drelu", tmp_path / "out", target_zeros=0.8)
    assert [line.partition(":")[0] for line in caplog.messages] == ["Layer 2 of 2"]
    assert again.calibration == whole.calibration
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_calibration_does_not_go_on_with_the_state_of_a_killed_one(
    calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    with killed_after("Layer 1"):
        calibrate("mistral", "drelu", tmp_path / "out")
    caplog.clear()
    calibrate("mistral", "drelu", tmp_path / "out", target_zeros=0.8)
    assert caplog.messages[0].startswith("Layer 1")


def test_thresholds_of_a_sharded_checkpoint_are_in_its_index(
    calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    source = tmp_path / "sharded"
    stock_model("mixtral").save_pretrained(source, max_shard_size="100KB")  # type: ignore[operator]
    copy_tokenizer(stock["mixtral"], source)
    found = calibrate(str(source), "drelu", tmp_path / "out", tokens=1024, target_zeros=0.9)
    assert (found.folder / "model.safetensors.index.json").is_file()
    stages = {stage.name: stage.loss for stage in found.calibration.stages}
    loss, _ = measured(load_sparse(found.folder), found)
    assert loss == pytest.approx(stages["refit"], abs=2e-4)
    with pytest.raises(ModelError, match="stores a mask already"):
        calibrate(str(found.folder), "reglu", tmp_path / "again", tokens=1024)


def test_too_few_sequences_are_refused(calibrate: Calibrate, tmp_path: Path) -> None:
    with pytest.raises(MixtureError, match="At least 8"):
        calibrate("mistral", "drelu", tmp_path / "out", tokens=256)


@pytest.mark.parametrize(("method", "refit"), [("wina", False), ("teal", False), ("chess", True)])
def test_what_is_not_measured_changes_no_bit_of_the_result(
    method: str, refit: bool, calibrate: Calibrate, tmp_path: Path
) -> None:
    found = {
        measure: calibrate(
            "mixtral",
            "swiglu",
            tmp_path / str(measure),
            tokens=512,
            measure=measure,
            method=method,
            refit=refit,
            target_zeros=0.5,
        )
        for measure in (True, False)
    }
    assert [len(found[measure].calibration.stages) for measure in (True, False)] == [3 if refit else 2, 0]
    wanted, other = (load_file(found[measure].folder / "model.safetensors") for measure in (True, False))
    assert wanted.keys() == other.keys()
    assert all(torch.equal(wanted[name], other[name]) for name in wanted)
