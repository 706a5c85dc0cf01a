"""Integers for weights and activations: each matrix against naive references, and whole checkpoints as transformers alone loads them."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.conversion.convert import config_of, convert
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.weight_zeros import TensorReader
from sparsify.errors import ExportError, ModelError, RecipeError
from sparsify.export.llamacpp.export import export_llamacpp
from sparsify.methods.base import check_method, method_of
from sparsify.methods.weights.gptq import gptq
from sparsify.methods.weights.integers import CHUNK_WEIGHTS, best_scales, nearest, round_to_nearest
from sparsify.methods.weights.sparsegpt import inverse_factor
from sparsify.methods.weights.statistics import InputStatistics
from sparsify.models import SparseModel
from sparsify.models.integer_linear import IntegerLinear, quantisation
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection
from sparsify.sparsity.active_parameters import parameters_by_part
from sparsify.sparsity.curves import measure_curves
from sparsify.sparsity.measure import summed_loss
from tests.methods.conftest import Calibrate, Calibrated, killed_after, measured
from tests.methods.weights.test_one_matrix import OUTPUTS, matrix_and_inputs
from tests.methods.weights.test_rotation import add_mask

MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "w8a8": ("rtn", {"weight_bits": 8, "activation_bits": 8}),
    "smoothquant": ("smoothquant", {}),
    "quarot": ("rrs", {"smooth_group": None}),
    "runtime smoothing": ("rrs", {"rotate": "none", "smooth_group": 16}),
    "rrs": ("rrs", {"smooth_group": 16, "kv_bits": 4}),
}


def naive_gptq(weight: torch.Tensor, x: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes column by column in float64: the inverse of what remains of the Hessian is computed anew after each column."""
    weight, hessian = weight.double().clone(), x.double().T @ x.double()
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    codes, top = torch.zeros_like(weight), 2 ** (bits - 1) - 1
    for i in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[i:, i:])
        for row in range(len(weight)):
            code = min(max(round(float(weight[row, i] / scales[row])), -top - 1), top)
            codes[row, i] = code
            error = weight[row, i] - code * scales[row]
            weight[row, i:] -= error / inverse[0, 0] * inverse[0]
    return codes


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [7, 128])
def test_gptq_is_that_of_a_naive_reference_column_by_column(bits: int, block: int) -> None:
    weight, x = matrix_and_inputs(bits)
    statistics = InputStatistics(x.shape[1], x.device, products=True)
    statistics.add(x.double())
    assert statistics.products is not None
    upper = inverse_factor(statistics.products, 0.01)
    assert upper is not None
    found = gptq(weight.double(), upper, torch.zeros(x.shape[1], dtype=torch.bool), bits, block)
    wanted = naive_gptq(weight, x, found.scales.double(), bits)
    assert float((found.codes.double() != wanted).double().mean()) < 0.005  # ties of rounding
    own, plain = found.dequantised(), round_to_nearest(weight, bits).dequantised()
    assert float((x @ (own - weight).T).norm()) < 0.9 * float((x @ (plain - weight).T).norm())


def test_a_clip_search_is_never_worse_than_the_scale_of_the_largest_weight() -> None:
    weight = torch.randn(OUTPUTS, 200, generator=torch.Generator().manual_seed(0)).pow(3)
    weight[3] = 0.0
    scales = best_scales(weight, 4)
    whole = (weight.abs().amax(1) / 7).clamp(min=1e-9)
    errors = [(nearest(weight, one, 4) * one[:, None] - weight).square().sum(1) for one in (scales, whole)]
    assert bool((errors[0] <= errors[1] + 1e-9).all())
    assert float(errors[0].sum()) < 0.9 * float(errors[1].sum())
    for row in range(OUTPUTS):  # no scale in a fine grid is much better
        tried = [whole[row] * share for share in torch.linspace(0.2, 1, 400)]
        least = min(
            float((nearest(weight[row : row + 1], one[None], 4) * one - weight[row]).square().sum()) for one in tried
        )
        assert float(errors[0][row]) <= 1.05 * least + 1e-9
    assert float(scales[3]) == 1.0


def test_a_clip_search_in_chunks_finds_each_row_s_scale() -> None:
    weight = torch.randn(5, CHUNK_WEIGHTS // 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(best_scales(weight, 4), torch.cat([best_scales(row[None], 4) for row in weight]))


@pytest.fixture(scope="module")
def quantised(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calibrated]:
    root = tmp_path_factory.mktemp("quantised")
    return {
        mode: calibrate("mistral", "swiglu", root / mode, method=method, method_settings=settings)
        for mode, (method, settings) in MODES.items()
    }


def test_curves_are_measured_where_other_numbers_are_bf16(quantised: dict[str, Calibrated]) -> None:
    model = load_sparse(quantised["rrs"].folder, "swiglu", torch.bfloat16)
    tokens = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "position_ids": torch.arange(24).expand(2, -1), "labels": tokens}
    curves = measure_curves(model, [batch], summed_loss)
    assert curves.cett
    assert all(0 <= point.sparsity <= 1 for point in curves.cett)


@pytest.mark.parametrize("mode", MODES)
def test_what_is_stored_is_what_was_measured(
    mode: str, quantised: dict[str, Calibrated], stock: dict[str, Path]
) -> None:
    found, method = quantised[mode], MODES[mode][0]
    model = load_sparse(found.folder, dtype=torch.float32)
    stored = quantisation(model.config)
    assert stored is not None
    assert stored.method == method
    names = [stage.name for stage in found.calibration.stages]
    assert names == ["dense", "weights as integers", method]
    losses = {stage.name: stage.loss for stage in found.calibration.stages}
    assert losses["dense"] == pytest.approx(
        measured(load_sparse(stock["mistral"], dtype=torch.float32), found)[0], abs=2e-4
    )
    assert losses[method] == pytest.approx(measured(model, found)[0], abs=2e-4)
    numbers = without_rounding(model)
    assert losses["weights as integers"] == pytest.approx(measured(numbers, found)[0], abs=2e-4)
    if stored.activation_bits == 16:
        assert losses[method] == pytest.approx(losses["weights as integers"], abs=2e-4)
    for one in model.modules():
        if isinstance(one, IntegerLinear):
            assert int(one.codes().abs().max()) <= 2 ** (stored.weight_bits - 1)
    assert model.config.tie_word_embeddings is False if stored.rotated_down else True


def without_rounding(model: SparseModel) -> SparseModel:
    """The same integer weights on activations that are numbers."""
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.activation_bits = 16
        if hasattr(module, "kv_bits"):
            module.kv_bits = 16
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3"])
def test_families_are_rotated_and_quantised(
    kind: str, calibrate: Calibrate, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"weight_bits": 8, "activation_bits": 8, "smooth_group": 16}
    found = calibrate(str(family_stock[kind]), "swiglu", tmp_path / "out", method="rrs", method_settings=settings)
    dense, integers, whole = (stage.loss for stage in found.calibration.stages)
    assert integers == pytest.approx(dense, abs=0.02)
    assert whole == pytest.approx(dense, abs=0.03)


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2"])
def test_families_that_cannot_be_rotated_are_quantised_without(
    kind: str, calibrate: Calibrate, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    activation = "geglu" if kind == "gemma3_text" else "swiglu"
    eight = {"weight_bits": 8, "activation_bits": 8}
    found = calibrate(str(family_stock[kind]), activation, tmp_path / "out", method="rtn", method_settings=eight)
    assert found.calibration.stages[-1].loss == pytest.approx(found.calibration.stages[0].loss, abs=0.03)
    with pytest.raises(RecipeError, match="rotate=none"):
        calibrate(str(family_stock[kind]), activation, tmp_path / "rrs", method="rrs")
    assert not (tmp_path / "rrs").exists()


FRESH = """
import json, sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="auto").eval()
ids = torch.arange(3, 43).view(2, 20)
with torch.no_grad():
    logits = model(input_ids=ids).logits
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
assert not [name for name in sys.modules if name.split(".")[0] == "sparsify"]
print(json.dumps({"logits": logits.float().tolist(), "tokens": tokens.tolist()}))
"""


@pytest.mark.parametrize("mode", ["rrs", "w8a8"])
def test_transformers_alone_computes_the_same_offline(mode: str, quantised: dict[str, Calibrated]) -> None:
    folder = quantised[mode].folder
    run = subprocess.run(
        [sys.executable, "-I", "-c", FRESH, str(folder)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert run.returncode == 0, run.stderr
    fresh = json.loads(run.stdout.splitlines()[-1])
    model, ids = load_sparse(folder), torch.arange(3, 43).view(2, 20)
    with torch.no_grad():
        assert torch.equal(torch.tensor(fresh["logits"]), model(input_ids=ids).logits.float())
        assert (
            fresh["tokens"] == model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
        )  # pyright: ignore


def test_integers_are_in_safetensors_as_the_configuration_says(quantised: dict[str, Calibrated]) -> None:
    read = TensorReader(quantised["rrs"].folder)
    codes, scales = (read(f"model.layers.0.mlp.up_proj.weight_{one}") for one in ("codes", "scales"))
    shape = load_sparse(quantised["rrs"].folder).model.layers[0].mlp.up_proj
    assert (codes.dtype, codes.shape) == (torch.uint8, (shape.out_features, shape.in_features // 2))
    assert (scales.dtype, scales.shape) == (torch.float32, (shape.out_features,))
    eight = TensorReader(quantised["w8a8"].folder)("model.layers.0.mlp.up_proj.weight_codes")
    assert (eight.dtype, eight.shape) == (torch.int8, (shape.out_features, shape.in_features))


def test_zeros_of_a_mask_stay_unless_down_is_rotated(
    calibrate: Calibrate, family_stock: dict[str, Path], tmp_path: Path
) -> None:
    convert(
        ModelSection(source=str(family_stock["mistral"])),
        ActivationSection("reglu"),
        tmp_path / "held",
        seed=0,
        dtype=torch.float32,
    )
    add_mask(tmp_path / "held", {"inter": {"rule": "threshold", "per": "channel"}}, tmp_path / "masked", 0.05)
    shares = {}
    for rotate in ("all", "residual"):
        settings = {"rotate": rotate, "smooth_group": 16}
        found = calibrate(str(tmp_path / "masked"), "reglu", tmp_path / rotate, method="rrs", method_settings=settings)
        model, seen = load_sparse(found.folder), []
        assert model.config.sparsification is not None
        down = model.model.layers[1].mlp.down_proj
        down.register_forward_pre_hook(lambda module, args, seen=seen: seen.append((args[0], module.read(args[0]))))
        with torch.no_grad():
            model(input_ids=torch.arange(3, 43)[None])
        before, after = seen[0]
        assert float((before == 0).double().mean()) > 0.5
        assert bool((after[before == 0] == 0).all()) == (rotate == "residual")
        shares[rotate] = float((after == 0).double().mean())
    assert shares["residual"] > 0.5 > shares["all"]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("rrs", {"activation_bits": 16}, "smooth_group is 128: with activation_bits=16"),
        ("rrs", {"weights": "rtn", "damping": 0.1}, "damping is 0.1: with weights=rtn"),
        ("rrs", {"rotate": "some"}, "rotate"),
        ("rrs", {"smooth_group": 0}, "smooth_group"),
        ("rtn", {"weight_bits": 3}, "weight_bits"),
        ("rtn", {"damping": 0.1}, "damping"),
        ("gptq", {"damping": 0}, "damping"),
        ("smoothquant", {"strength": 1.5}, "strength"),
        ("smoothquant", {"activation_bits": 16}, "activation_bits"),
    ],
)
def test_settings_that_are_invalid_or_would_be_ignored_are_refused(
    method: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(calibration_tokens=1024, method=method, method_settings=settings))


@pytest.mark.parametrize("kind", ["mixtral"])
def test_experts_are_refused_with_the_reason(kind: str, calibrate: Calibrate, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="experts are held as one tensor"):
        calibrate(kind, "swiglu", tmp_path / "out", method="rrs")
    assert list(tmp_path.iterdir()) == []


def test_integers_are_neither_converted_nor_trained(quantised: dict[str, Calibrated]) -> None:
    with pytest.raises(ModelError, match="neither converted nor trained"):
        config_of(ModelSection(source=str(quantised["rrs"].folder)), ActivationSection("swiglu"))
    with pytest.raises(RecipeError, match="Train first"):
        check_method(ConversionSection(calibration_tokens=1024, method="rrs"))


def test_what_reads_weights_refuses_integers_or_sees_numbers(quantised: dict[str, Calibrated], tmp_path: Path) -> None:
    folder = quantised["rrs"].folder
    model = load_sparse(folder, dtype=torch.float32)
    with pytest.raises(ExportError, match="integers with a scale for each output"):
        export_llamacpp(str(folder), tmp_path / "file")
    x, down = torch.randn(5, model.config.intermediate_size), model.model.layers[0].mlp.down_proj
    down.activation_bits = 16
    assert torch.allclose(x @ down.weight.T, down(x), atol=1e-4)
    assert parameters_by_part(model)["down"] == sum(layer.mlp.down_proj.weight.numel() for layer in model.model.layers)


def test_an_interrupted_quantisation_resumes(
    calibrate: Calibrate, quantised: dict[str, Calibrated], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    method, settings = MODES["rrs"]
    with killed_after("Layer 1"):
        calibrate("mistral", "swiglu", tmp_path / "out", method=method, method_settings=settings)
    found = calibrate("mistral", "swiglu", tmp_path / "out", method=method, method_settings=settings)
    old, new = (TensorReader(one.folder) for one in (quantised["rrs"], found))
    for name in load_sparse(found.folder).state_dict():
        assert torch.equal(old(name), new(name)), name
