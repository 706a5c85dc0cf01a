"""WINA: scores with the norm of the matrix that is masked, its law, and its transform."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods.base import method_of
from sparsify.methods.layer_expert import Expert
from sparsify.methods.sites import BlockValues
from sparsify.methods.wina import Wina, WinaSettings
from sparsify.models import FfnActivation, SiteMask, SparseModel
from sparsify.recipe.sparsification import ConversionSection
from sparsify.sparsity.probe import SparsityProbe
from tests.methods.conftest import Calibrate, Calibrated, measured
from tests.runtime.blocks import IDS

KINDS = ("mistral", "mixtral")
kinds = pytest.mark.parametrize("kind", KINDS)
SEVEN = ["attn_in.q", "attn_in.k", "attn_in.v", "attn_out", "ffn_in.gate", "ffn_in.up", "inter"]


@pytest.fixture(scope="module")
def masked(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Calibrated]:
    """Both kinds of model without half of what projections read, with and without the transform."""
    root = tmp_path_factory.mktemp("wina")
    return {
        (kind, transform): calibrate(
            kind,
            "swiglu",
            root / f"{kind}-{transform}",
            method="wina",
            target_zeros=0.5,
            method_settings={"transform": transform},
        )
        for kind in KINDS
        for transform in (False, True)
    }


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=25)
def test_no_other_mask_of_that_size_has_a_smaller_error_where_columns_are_orthogonal(seed: int, kept: int) -> None:
    torch.manual_seed(seed)
    down = torch.linalg.qr(torch.randn(14, 10)).Q * torch.rand(10).mul(4).exp()
    method = Wina(WinaSettings(target_zeros=1 - kept / 10))
    expert = Expert(torch.zeros(10, 14), torch.zeros(10, 14), down, FfnActivation("swiglu"))
    layer = BlockValues([expert], lambda: iter(()), method.sites)
    parts = method.fit("inter", layer).parts
    mask = SiteMask(method.sites["inter"], {part: tuple(values.shape) for part, values in parts.items()}).put(parts)
    x = torch.randn(10)
    chosen = mask(x, 0)
    assert int((chosen != 0).sum()) == kept
    error = (down.double() @ (x - chosen).double()).norm()
    for places in combinations(range(10), 10 - kept):
        dropped = torch.zeros(10, dtype=torch.float64)
        dropped[list(places)] = x[list(places)].double()
        assert error <= (down.double() @ dropped).norm() * (1 + 1e-5)


def matrices(model: SparseModel, layer: int) -> dict[str, torch.Tensor]:
    """The weights that read each of the seven inputs, [outputs, channels] or [experts, outputs, channels]."""
    attention, block = model.model.layers[layer].self_attn, model.ffn_blocks()[layer]
    if hasattr(block, "gate_up_proj"):
        gate, up = block.gate_up_proj.chunk(2, dim=1)
        ffn = [gate, up, block.down_proj]
    else:
        ffn = [block.gate_proj.weight, block.up_proj.weight, block.down_proj.weight]
    parts: list[Any] = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    return dict(zip(SEVEN, [*(part.weight for part in parts), *ffn], strict=True))


def stored(model: SparseModel, layer: int) -> dict[str, torch.Tensor]:
    """The weights of scores, in the order of sites."""
    prefix = f"model.layers.{layer}."
    return {
        name.removeprefix(prefix): b
        for name, b in model.named_buffers()
        if name.startswith(prefix) and "weight" in name
    }


@kinds
def test_every_input_is_weighed_by_the_matrix_that_reads_it(
    kind: str, masked: dict[tuple[str, bool], Calibrated], stock: dict[str, Path]
) -> None:
    model = load_sparse(masked[kind, False].folder)
    for layer in (0, 1):
        wanted = [matrix.double().square().sum(-2).sqrt() for matrix in matrices(model, layer).values()]
        found = list(stored(model, layer).values())
        assert len(found) == 7
        for norms in wanted:
            assert any(norms.shape == each.shape and torch.allclose(each.double(), norms, rtol=1e-5) for each in found)
    before, after = load_sparse(stock[kind]).state_dict(), model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@kinds
def test_the_transform_makes_columns_of_key_and_gate_orthogonal(
    kind: str, masked: dict[tuple[str, bool], Calibrated]
) -> None:
    model = load_sparse(masked[kind, True].folder)
    for layer in (0, 1):
        read = {site: matrix.double() for site, matrix in matrices(model, layer).items()}
        for site, together in (("attn_in.k", "attn_in"), ("ffn_in.gate", "ffn_in")):
            gram = read[site].flatten(0, -2).T @ read[site].flatten(0, -2)
            assert (gram - gram.diag().diag()).abs().max() < 1e-4 * gram.diag().max()
            assert (gram.diag().diff() < 1e-5 * gram.diag().max()).all()
            # The mask is shared, so the norms are those of all the projections that read it.
            readers = [matrix.flatten(0, -2) for name, matrix in read.items() if name.startswith(together)]
            home: Any = model.model.layers[layer].self_attn if together == "attn_in" else model.ffn_blocks()[layer]
            assert torch.allclose(home.input_mask.weight.double(), torch.cat(readers).norm(dim=0), rtol=1e-4)


@kinds
@pytest.mark.parametrize("transform", [False, True])
def test_other_text_has_the_wanted_zeros_and_the_stored_model_the_loss_of_the_calibration(
    kind: str, transform: bool, masked: dict[tuple[str, bool], Calibrated]
) -> None:
    found = masked[kind, transform]
    model = load_sparse(found.folder)
    loss, zeros = measured(model, found)
    assert found.calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    assert zeros == pytest.approx(0.5, abs=1e-3)
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(IDS)
    seen = probe.statistics().site_zero_shares()
    assert list(seen) == (["attn_in", "attn_out", "ffn_in"] if transform else SEVEN[:-1])
    assert list(seen.values()) == [0.5] * len(seen)


@kinds
def test_a_share_of_0_is_the_dense_model(
    kind: str, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    dense = load_sparse(stock[kind])(IDS).logits
    for transform in (False, True):
        model = calibrated(calibrate, kind, tmp_path / str(transform), zeros=0.0, transform=transform)
        assert torch.equal(model(IDS).logits, dense)
    # Of 32 and 64 elements all are kept, along other axes.
    turned = calibrated(calibrate, kind, tmp_path / "turned", zeros=0.005, transform=True)
    torch.testing.assert_close(turned(IDS).logits, dense, rtol=0, atol=1e-4)
    assert not torch.equal(turned(IDS).logits, dense)


def calibrated(calibrate: Calibrate, kind: str, to: Path, *, zeros: float, transform: bool) -> SparseModel:
    settings = {"method_settings": {"transform": transform}}
    return load_sparse(calibrate(kind, "swiglu", to, tokens=640, method="wina", target_zeros=zeros, **settings).folder)


@pytest.mark.parametrize(
    ("given_settings", "message"),
    [
        ({}, "wina needs conversion.target_zeros"),
        ({"target_zeros": 0.5, "method_settings": {"transform": "some"}}, "transform is some"),
        ({"target_zeros": 0.5, "method_settings": {"alpha": 1}}, "wina has no such setting"),
    ],
)
def test_what_it_cannot_be_is_refused(given_settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(method="wina", **given_settings))
