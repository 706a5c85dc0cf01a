"""La RoSA: principal axes of the inputs, shares by site, and a rotation that changes nothing by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.base import method_of
from sparsify.methods.la_rosa import LaRosa, LaRosaSettings
from sparsify.methods.layer_expert import turned
from sparsify.models import SparseModel
from sparsify.recipe.catalogue import PACKAGE
from sparsify.recipe.sparsification import ConversionSection
from sparsify.sparsity.probe import SparsityProbe
from tests.methods.conftest import Calibrate, measured
from tests.runtime.blocks import IDS

kinds = pytest.mark.parametrize("kind", ["mistral", "mixtral"])


def input_masks(model: SparseModel) -> list[Any]:
    """The masks of rotated inputs, two for each layer."""
    layers: list[Any] = list(model.model.layers)
    blocks = zip(layers, model.ffn_blocks(), strict=True)
    return [mask for layer, block in blocks for mask in (layer.self_attn.input_mask, block.input_mask)]


@kinds
def test_with_every_element_kept_the_rotated_model_is_the_dense_one(
    kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    dense = load_sparse(stock[kind])
    nothing = calibrate(kind, "swiglu", tmp_path / "nothing", tokens=640, method="la_rosa", target_zeros=0.0)
    assert torch.equal(load_sparse(nothing.folder)(IDS).logits, dense(IDS).logits)
    # Of 32 and 64 elements all are kept, along other axes.
    found = calibrate(kind, "swiglu", tmp_path / "out", method="la_rosa", target_zeros=0.005)
    model = load_sparse(found.folder)
    torch.testing.assert_close(model(IDS).logits, dense(IDS).logits, rtol=0, atol=1e-4)
    # The weights are rotated, and nothing else is: each input's own axes, uncorrelated and in the order of their energy.
    seen: list[torch.Tensor] = []
    for mask in input_masks(model):
        mask.register_forward_hook(lambda _, __, rotated: seen.append(rotated.detach().flatten(0, -2).double()))
    measured(model, found)
    masks = input_masks(model)
    for number, mask in enumerate(masks):
        assert torch.allclose(mask.basis.double().T @ mask.basis.double(), torch.eye(32).double(), atol=1e-5)
        energies = torch.cat(seen[number :: len(masks)]).square().mean(0)
        assert energies[:8].sum() > 0.4 * energies.sum()
    assert not torch.allclose(masks[0].basis, masks[1].basis, atol=1e-2)


@kinds
def test_inputs_and_outputs_get_their_shares_on_other_text(kind: str, calibrate: Calibrate, tmp_path: Path) -> None:
    found = calibrate(kind, "swiglu", tmp_path / "out", method="la_rosa", target_zeros=0.5)
    model = load_sparse(found.folder)
    loss, zeros = measured(model, found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    assert zeros == pytest.approx(0.6, abs=0.01)
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(IDS)
    seen = probe.statistics().site_zero_shares()
    assert seen == pytest.approx({"attn_in": 0.4, "attn_out": 0.6, "ffn_in": 0.4}, abs=0.02)


def test_the_axes_are_those_of_the_calibration_values(
    calibrate: Calibrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grams: list[torch.Tensor] = []
    fit = LaRosa.fit

    def watched(self: LaRosa, site: str, layer: Any) -> Any:
        if site in ("attn_in", "ffn_in"):
            values = torch.cat([chunk.values for chunk in layer.values(site)]).double()
            grams.append(values.T @ values)
        return fit(self, site, layer)

    monkeypatch.setattr(LaRosa, "fit", watched)
    found = calibrate("mixtral", "swiglu", tmp_path / "out", method="la_rosa", target_zeros=0.5)
    masks = input_masks(load_sparse(found.folder))
    assert len(masks) == len(grams) == 4
    for mask, gram in zip(masks, grams, strict=True):
        turned = mask.basis.double().T @ gram @ mask.basis.double()
        assert (turned - turned.diag().diag()).abs().max() < 1e-5 * turned.diag().max()
        assert (turned.diag().diff() < 1e-6 * turned.diag().max()).all()


def test_a_rounded_rotation_leaves_only_the_error_of_rounded_weights() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32, dtype=torch.float64), torch.randn(50, 32, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(32, 32)).Q.bfloat16().double()
    torch.testing.assert_close((x @ basis) @ turned(weight, basis).T, x @ weight.T, rtol=1e-9, atol=1e-9)


def test_without_rotation_no_weight_changes(calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path) -> None:
    plain = {"method": "la_rosa", "method_settings": {"rotation": False}}
    found = calibrate("mistral", "swiglu", tmp_path / "half", target_zeros=0.5, **plain)
    dense = load_sparse(stock["mistral"])
    after = load_sparse(found.folder).state_dict()
    assert all(torch.equal(after[name], values) for name, values in dense.state_dict().items())


@given(st.floats(0, 0.999), st.floats(0, 0.999))
def test_shares_are_the_wanted_ones_on_average_and_fall_with_them(one: float, other: float) -> None:
    less, more = (LaRosa(LaRosaSettings(target_zeros=zeros)).kept_shares for zeros in sorted((one, other)))
    assert less["attn_in"] + less["attn_out"] == pytest.approx(2 * (1 - min(one, other)))
    assert all(0 < more[site] <= less[site] + 1e-12 for site in less)
    assert less.keys() == LaRosa(LaRosaSettings(target_zeros=0.5)).sites.keys()


@pytest.mark.slow
def test_its_axes_cost_less_than_the_same_shares_without_rotation(tmp_path: Path) -> None:
    calibrate = Calibrate(Path("quickstart"), {}, tmp_path / "cache")
    loss = {
        rotation: calibrate(
            str(PACKAGE / "assets" / "quickstart_base"),
            "swiglu",
            tmp_path / str(rotation),
            tokens=8192,
            method="la_rosa",
            target_zeros=0.6,
            method_settings={"rotation": rotation},
        )
        .calibration.stages[-1]
        .loss
        for rotation in (True, False)
    }
    assert loss[True] < loss[False] - 0.02


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "la_rosa needs conversion.target_zeros"),
        ({"target_zeros": 0.5, "method_settings": {"rotation": "some"}}, "rotation is some"),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(method="la_rosa", **settings))
