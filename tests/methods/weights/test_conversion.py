"""Weight sparsity of whole checkpoints: the layers are computed one by one here, and as one model by what is stored."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from sparsify.conversion.layout import projection_names, tensor_shapes
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.weight_zeros import PROJECTIONS, TensorReader, count_zeros, weight_sparsity
from sparsify.errors import ModelError, RecipeError
from sparsify.methods import base
from sparsify.models import SparseModel
from tests.methods.conftest import Calibrate, Calibrated, killed_after, measured
from tests.methods.test_sites import ARRANGEMENTS, EverySite

GPT = {"method": "sparsegpt", "weight_sparsity": 0.5}


@pytest.fixture(scope="module")
def pruned(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calibrated]:
    root = tmp_path_factory.mktemp("pruned")
    return {kind: calibrate(kind, "swiglu", root / kind, **GPT) for kind in ("mistral", "mixtral")}


def shares(folder: Path, model: SparseModel) -> list[float]:
    return [one.share for one in count_zeros(model.config, TensorReader(folder))]


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_half_of_every_matrix_is_zero_and_the_model_computes_what_was_measured(
    kind: str, pruned: dict[str, Calibrated], stock: dict[str, Path]
) -> None:
    found = pruned[kind]
    model = load_sparse(found.folder)
    assert shares(found.folder, model) == pytest.approx([0.5] * 14, abs=0.005)
    stored = weight_sparsity(json.loads((found.folder / "config.json").read_text()))
    assert stored == weight_sparsity(model.config)
    assert stored is not None
    assert stored.words == "50% of the weights zero, by sparsegpt"
    first, last = found.calibration.stages
    assert (first.name, last.name) == ("dense", "sparsegpt")
    dense = load_sparse(stock[kind])
    assert first.loss == pytest.approx(measured(dense, found)[0], abs=2e-4)
    assert last.loss == pytest.approx(measured(model, found)[0], abs=2e-4)
    projections = {name for p in PROJECTIONS for layer in (0, 1) for name in projection_names(model.config, layer, p)}
    read, old = TensorReader(found.folder), TensorReader(stock[kind])
    for name in tensor_shapes(model.config):
        assert torch.equal(read(name), old(name)) == (name not in projections)


def test_experts_with_too_few_tokens_are_left_to_wanda_and_said(pruned: dict[str, Calibrated]) -> None:
    layers = pruned["mixtral"].calibration.layers
    matrices = [one for layer in layers for expert in layer["experts"] for one in expert["weights"].values()]
    assert {one["by"] for one in matrices} == {"sparsegpt", "wanda"}
    for one in matrices:
        assert one["zeros"] == 0.5
        assert (one["by"] == "wanda") == ("calibration tokens reached it" in str(one["because"]))
    # The attention sees all tokens.
    assert {one["by"] for layer in layers for one in layer["attention"]["weights"].values()} == {"sparsegpt"}


def test_experts_may_be_calibrated_on_all_tokens_and_compute_on_their_own(
    pruned: dict[str, Calibrated], calibrate: Calibrate, tmp_path: Path
) -> None:
    found = calibrate("mixtral", "swiglu", tmp_path / "out", **GPT, method_settings={"calibrate_all_experts": True})
    layers = found.calibration.layers
    matrices = [one for layer in layers for expert in layer["experts"] for one in expert["weights"].values()]
    assert {one["by"] for one in matrices} == {"sparsegpt"}, "some were left to Wanda without it"
    assert found.calibration.stages[-1].loss == pytest.approx(measured(load_sparse(found.folder), found)[0], abs=2e-4)
    # In the first layer the attention is pruned alike, and every expert on other tokens.
    own, routed = TensorReader(found.folder), TensorReader(pruned["mixtral"].folder)
    names = projection_names(load_sparse(found.folder).config, 0, "gate_proj")
    assert not any(torch.equal(own(name), routed(name)) for name in names)
    (query,) = projection_names(load_sparse(found.folder).config, 0, "q_proj")
    assert torch.equal(own(query), routed(query))


@pytest.mark.parametrize(
    ("kind", "arrangement", "method"),
    [
        ("mistral", "thresholds", "sparsegpt"),
        ("mistral", "rotated", "wanda"),
        ("mistral", "projections", "wanda"),
        ("mixtral", "projections", "sparsegpt"),
        ("mixtral", "rotated", "wanda"),
    ],
)
def test_it_follows_every_mask_and_keeps_it(
    kind: str,
    arrangement: str,
    method: str,
    calibrate: Calibrate,
    stock: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(base._METHODS, EverySite.name, EverySite)
    monkeypatch.setattr(EverySite, "sites", ARRANGEMENTS[arrangement], raising=False)
    monkeypatch.setattr(EverySite, "config", AutoConfig.from_pretrained(stock[kind]), raising=False)
    calibrate(kind, "swiglu", tmp_path / "masked", method="every_site", measure=False)
    found = calibrate(str(tmp_path / "masked"), "swiglu", tmp_path / "both", method=method, weight_sparsity=0.5)
    source, model = load_sparse(tmp_path / "masked"), load_sparse(found.folder)
    assert model.config.sparsification == source.config.sparsification
    before = dict(source.named_buffers())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert shares(found.folder, model) == pytest.approx([0.5] * 14, abs=0.005)
    first, last = found.calibration.stages
    assert first.name == "source"
    for stage, one in ((first, source), (last, model)):
        loss, zeros = measured(one, found)
        assert stage.loss == pytest.approx(loss, abs=2e-4)
        assert stage.zeros == pytest.approx(zeros, abs=2e-3)


def test_it_follows_an_activation_replacement_in_one_conversion(calibrate: Calibrate, tmp_path: Path) -> None:
    found = calibrate("mistral", "reglu", tmp_path / "out", **GPT)
    assert [stage.name for stage in found.calibration.stages] == ["dense", "bare replacement", "sparsegpt"]
    model = load_sparse(found.folder)
    loss, zeros = measured(model, found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    assert found.calibration.stages[-1].zeros == pytest.approx(zeros, abs=2e-3)
    assert zeros > 0.3


def test_an_interrupted_conversion_resumes_with_the_same_bits(
    pruned: dict[str, Calibrated], calibrate: Calibrate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    with killed_after("Layer 1 of 2"):
        calibrate("mixtral", "swiglu", tmp_path / "again", **GPT)
    again = calibrate("mixtral", "swiglu", tmp_path / "again", **GPT)
    file = "model.safetensors"
    assert (again.folder / file).read_bytes() == (pruned["mixtral"].folder / file).read_bytes()


def test_half_becomes_seventy_per_cent_and_keeps_its_zeros(
    pruned: dict[str, Calibrated], calibrate: Calibrate, tmp_path: Path
) -> None:
    source = pruned["mistral"].folder
    found = calibrate(str(source), "swiglu", tmp_path / "more", method="sparsegpt", weight_sparsity=0.7)
    model = load_sparse(found.folder)
    assert shares(found.folder, model) == pytest.approx([0.7] * 14, abs=0.01)
    read, old = TensorReader(found.folder), TensorReader(source)
    for projection in PROJECTIONS:
        (name,) = projection_names(model.config, 1, projection)
        assert not read(name)[old(name) == 0].any()
    assert found.calibration.stages[0].name == "source"


def test_layers_may_have_shares_of_their_own(calibrate: Calibrate, tmp_path: Path) -> None:
    settings = {"method_settings": {"layer_shares": [0.25, 0.75]}}
    found = calibrate("mistral", "swiglu", tmp_path / "out", method="magnitude", weight_sparsity=0.5, **settings)
    assert shares(found.folder, load_sparse(found.folder)) == pytest.approx([0.25] * 7 + [0.75] * 7, abs=0.001)


def test_what_would_lose_zeros_or_cannot_be_is_refused(
    pruned: dict[str, Calibrated], calibrate: Calibrate, tmp_path: Path
) -> None:
    source = str(pruned["mistral"].folder)
    for settings in (
        {"method": "thresholds", "target_zeros": 0.5},
        {"method": "la_rosa", "target_zeros": 0.5},
        {"method": "calibrated_replacement", "target_zeros": 0.5},
    ):
        with pytest.raises(ModelError, match=r"has sparse weights, which .* would make dense"):
            calibrate(source, "swiglu", tmp_path / "out", **settings)
    with pytest.raises(RecipeError, match="has 50% of the weights zero, by sparsegpt already"):
        calibrate(source, "swiglu", tmp_path / "out", method="wanda", weight_sparsity=0.4)
    one = {**GPT, "method_settings": {"layer_shares": [0.5]}}
    with pytest.raises(RecipeError, match="has 1 shares, and the model 2 layers"):
        calibrate("mistral", "swiglu", tmp_path / "out", **one)
    with pytest.raises(RecipeError, match="and q_proj has 32 inputs"):
        calibrate(
            "mistral",
            "swiglu",
            tmp_path / "out",
            method="wanda",
            weight_sparsity=0.4,
            method_settings={"pattern": "3:5"},
        )
    every = {"weight_sparsity": 0.5, "method_settings": {"calibrate_all_experts": True}}
    with pytest.raises(RecipeError, match="calibrate_all_experts is true, and the model has no experts"):
        calibrate("mistral", "swiglu", tmp_path / "out", method="sparsegpt", **every)
    with pytest.raises(RecipeError, match="calibrate_all_experts is true, and magnitude reads no tokens"):
        calibrate("mixtral", "swiglu", tmp_path / "out", method="magnitude", **every)
    assert not (tmp_path / "out").exists()
    masked = calibrate(source, "swiglu", tmp_path / "out", method="cats", target_zeros=0.5)
    assert shares(masked.folder, load_sparse(masked.folder)) == pytest.approx([0.5] * 14, abs=0.005)
