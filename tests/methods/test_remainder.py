"""The constant remainder: the mean of what a mask drops, through the matrix that reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.base import Fitted, LayerValues, MethodSettings, method_of
from sparsify.methods.layer_expert import Expert, Routes
from sparsify.methods.layerwise import Inputs
from sparsify.methods.remainder import ConstantRemainder
from sparsify.methods.sites import fit_block
from sparsify.models import FfnActivation, SiteRule
from sparsify.recipe.sparsification import ConversionSection
from tests.methods.conftest import Calibrate, measured

HALF = {"method": "percentile", "target_zeros": 0.6}


class Halves:
    """Half of the largest elements at each of some sites."""

    name, paper, Settings, reconstructs = "halves", "none", MethodSettings, False

    def __init__(self, sites: dict[str, SiteRule]) -> None:
        self.sites = sites

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        parts = {"kept_share": torch.tensor([0.5])}
        if self.sites[site].rotated:
            parts["basis"] = torch.linalg.qr(torch.randn(16, 16)).Q
        return Fitted(parts)


@pytest.mark.parametrize("num_experts", [1, 3])
@pytest.mark.parametrize(
    "sites", [["inter"], ["gate"], ["gate", "inter"], ["up"], ["ffn_in", "inter"], ["ffn_in.gate", "gate"]]
)
def test_what_a_block_adds_keeps_its_mean_over_the_calibration_tokens(sites: list[str], num_experts: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 16) + 0.5
    routes = Routes(torch.randint(0, num_experts, (200, 1)), torch.ones(200, 1))
    everything = torch.ones(200, dtype=torch.bool)
    activation = FfnActivation("swiglu")
    experts = [Expert(*torch.randn(2, 24, 16).unbind(), torch.randn(16, 24), activation) for _ in range(num_experts)]
    rules = {site: SiteRule(rule="top_k", rotated=site == "ffn_in") for site in sites}

    def inputs() -> Iterator[Inputs]:
        yield Inputs(x, routes, torch.zeros_like(x), everything, ~everything)

    for mask, keeps_mean in ((Halves(rules), False), (ConstantRemainder(Halves(rules)), True)):
        masked, _, _ = fit_block(mask, experts, inputs, torch.float32)
        if sites[0].startswith("ffn_in"):
            # Inputs in the mean: of what the gate projection makes of them.
            pairs = [
                (old.gate, new.project("gate_proj", new.input_mask(x) if new.input_mask else x))
                for old, new in zip(experts, masked, strict=True)
            ]
            rows = [routes.of(number)[0] if "." in sites[0] else slice(None) for number in range(num_experts)]
            errors = [(made[row] - x[row] @ gate.T).mean(0) for (gate, made), row in zip(pairs, rows, strict=True)]
        else:
            errors = [
                (new.output(x[routes.of(number)[0]]) - old.output(x[routes.of(number)[0]])).mean(0)
                for number, (old, new) in enumerate(zip(experts, masked, strict=True))
            ]
        assert all((error.abs().max() < 1e-4) == keeps_mean for error in errors)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_loaded_model_is_the_calibrated_one(kind: str, calibrate: Calibrate, tmp_path: Path) -> None:
    settings = {**HALF, "method_settings": {"site": "gate"}}
    found = calibrate(kind, "swiglu", tmp_path / "constant", remainder="constant", **settings)
    model = load_sparse(found.folder)
    rule = model.config.sparsification["sites"]["inter"]
    assert rule == {"rule": "threshold", "per": "layer", "remainder": "constant"}
    stage = found.calibration.stages[-1]
    assert (stage.loss, stage.zeros) == pytest.approx(measured(model, found), abs=2e-3)


def test_a_reconstruction_may_follow(calibrate: Calibrate, tmp_path: Path) -> None:
    found = calibrate("mistral", "swiglu", tmp_path / "out", remainder="constant", refit=True, **HALF)
    loss, _ = measured(load_sparse(found.folder), found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    experts = [expert for layer in found.calibration.layers for expert in layer["experts"]]
    assert all(each["error_refitted"] < each["error_before"] for each in experts)


def test_where_no_mask_is_fitted_it_would_be_ignored() -> None:
    with pytest.raises(RecipeError, match="remainder=constant would be ignored"):
        method_of(ConversionSection(calibration_tokens=1024, remainder="constant"))
