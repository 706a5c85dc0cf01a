"""R-Sparse: columns and low-rank factors share what a projection may read."""

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
from sparsify.methods.density import method_density
from sparsify.methods.r_sparse import PROJECTIONS, RSparse, RSparseSettings, low_rank_factors
from sparsify.models import SiteRule
from sparsify.models.masking import projection_shapes
from sparsify.models.projection_masks import ProjectionMask
from sparsify.recipe.sparsification import ConversionSection
from sparsify.sparsity.probe import SparsityProbe
from tests.methods.conftest import Calibrate, Calibrated, measured
from tests.runtime.blocks import IDS

KINDS = ("mistral", "mixtral")
kinds = pytest.mark.parametrize("kind", KINDS)
ALPHA = 0.7


@pytest.fixture(scope="module")
def masked(calibrate: Calibrate, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Calibrated]:
    root = tmp_path_factory.mktemp("r_sparse")
    wanted: dict[str, Any] = {"method": "r_sparse", "target_zeros": 0.5, "method_settings": {"alpha": ALPHA}}
    return {kind: calibrate(kind, "swiglu", root / kind, **wanted) for kind in KINDS}


def own_masks(model: Any, layer: int) -> dict[str, tuple[Any, torch.Tensor]]:
    """Mask and weights of the projections with factors; of fused experts, those of expert 2."""
    attention, block = model.model.layers[layer].self_attn, model.ffn_blocks()[layer]
    found = {name: (part := getattr(attention, name), part.weight) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    for number, name in enumerate(("gate_proj", "up_proj")):
        if hasattr(block, "gate_up_proj"):
            found[name] = getattr(block, f"{name}_mask").of_expert(2), block.gate_up_proj[2].chunk(2)[number]
        else:
            found[name] = (part := getattr(block, name)), part.weight
    return found


@kinds
def test_a_projection_reads_its_columns_and_the_best_factors_of_its_size(
    kind: str, masked: dict[str, Calibrated]
) -> None:
    model = load_sparse(masked[kind].folder)
    shapes = projection_shapes(model.config)
    torch.manual_seed(0)
    for layer in (0, 1):
        for name, (own, weight) in own_masks(model, layer).items():
            rows, columns = shapes[name]
            wide = weight.detach().double()
            rank = max(1, int((1 - ALPHA) * 0.5 * rows * columns / (rows + columns)))
            u, s, v = torch.linalg.svd(wide)
            best = u[:, :rank] @ s[:rank].diag() @ v[:rank]
            x = torch.randn(5, columns)
            thresholds = own.input_mask.threshold.double()
            kept = torch.where(x.double().abs() > thresholds, x.double(), 0)
            wanted = kept @ wide.T + (x.double() - kept) @ best.T
            mask = own if isinstance(own, ProjectionMask) else ProjectionMask.of(own)
            with torch.no_grad():
                found = mask(x, lambda masked, weight=weight: masked @ weight.T)
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
            # One number of the layer for |x| times the norm of what it is multiplied by.
            scores = thresholds * wide.norm(dim=0)
            assert torch.allclose(scores, scores.mean().expand_as(scores), rtol=1e-4)
            assert ALPHA * 0.5 + rank * (rows + columns) / (rows * columns) <= 0.5 + (rank == 1) * 0.2


@kinds
def test_other_text_has_the_wanted_zeros_and_the_stored_model_the_loss_of_the_calibration(
    kind: str, masked: dict[str, Calibrated], stock: dict[str, Path]
) -> None:
    model = load_sparse(masked[kind].folder)
    with SparsityProbe(model) as probe:
        loss, zeros = measured(model, masked[kind])
    assert masked[kind].calibration.stages[-1].loss == pytest.approx(loss, abs=2e-4)
    assert zeros == pytest.approx(0.5, abs=0.04)
    seen = probe.statistics().site_zero_shares()
    # The attention's output shrinks as a document grows, and these sequences are short.
    assert seen.pop("attn_out") == pytest.approx(1 - ALPHA * 0.5, abs=0.1)
    assert seen == pytest.approx(
        dict.fromkeys([site for site in PROJECTIONS if site in seen], 1 - ALPHA * 0.5), abs=0.04
    )
    before, after = load_sparse(stock[kind]).state_dict(), model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_factors_of_full_rank_are_the_matrix(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(shape), torch.randn(4, shape[1])
    left, right = low_rank_factors(matrix, min(shape))
    parts = {"threshold": (1,), "own.left": tuple(left.shape), "own.right": tuple(right.shape)}
    mask = ProjectionMask(SiteRule(remainder="low_rank", rank=min(shape)), parts, "own", own_input=True)
    mask.remainder_left, mask.remainder_right = left, right
    assert mask.input_mask is not None
    mask.input_mask.threshold.fill_(0.7)
    torch.testing.assert_close(mask(x, lambda masked: masked @ matrix.T), x @ matrix.T, rtol=1e-4, atol=1e-5)


@given(st.floats(0, 0.99), st.floats(0.01, 1), st.integers(64, 4096), st.integers(64, 4096))
def test_columns_and_factors_stay_within_what_may_be_read(zeros: float, alpha: float, rows: int, columns: int) -> None:
    method = RSparse(RSparseSettings(target_zeros=zeros, alpha=alpha))
    assert method.kept_shares.keys() == method.sites.keys()
    assert method.kept_shares["inter"] == pytest.approx(1 - zeros)
    rule = method.sites.get("attn_out", SiteRule())
    assert rule.problem("attn_out") == ""
    if rule.remainder == "low_rank" and (rank := rule.rank_of(rows, columns)) > 1:
        factors = rank * (rows + columns) / (rows * columns)
        assert method.kept_shares["attn_out"] + factors <= 1 - zeros + 1e-9


@kinds
def test_its_density_is_the_share_that_it_may_read(kind: str, masked: dict[str, Calibrated]) -> None:
    """Up to the factors of small projections, whose rank is at least 1."""
    config = load_sparse(masked[kind].folder).config
    config.hidden_size, config.intermediate_size = 2048, 6144
    for alpha in (1.0, ALPHA):
        wanted = ConversionSection(method="r_sparse", target_zeros=0.4, method_settings={"alpha": alpha})
        assert method_density(config, wanted) == pytest.approx(0.6, abs=2e-3)


@kinds
@pytest.mark.parametrize("alpha", [1.0, 0.8])
def test_a_share_of_0_is_the_dense_model_bit_by_bit(
    kind: str, alpha: float, calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path
) -> None:
    found = calibrate(
        kind,
        "swiglu",
        tmp_path / "out",
        tokens=640,
        method="r_sparse",
        target_zeros=0.0,
        method_settings={"alpha": alpha},
    )
    assert torch.equal(load_sparse(found.folder)(IDS).logits, load_sparse(stock[kind])(IDS).logits)


def test_a_rank_that_no_model_has_is_refused() -> None:
    rule = SiteRule(remainder="low_rank", rank=2, rank_share=0.1)
    assert "of rank 2 and of a share of 0.1" in rule.problem("attn_out")
    assert SiteRule(remainder="low_rank").problem("attn_out")
    assert SiteRule(rank_share=0.1).problem("attn_out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "r_sparse needs conversion.target_zeros"),
        ({"target_zeros": 0.5, "method_settings": {"alpha": 0}}, "alpha is 0: input should be greater than 0"),
        (
            {"target_zeros": 0.5, "method_settings": {"alpha": 1.2}},
            "alpha is 1.2: input should be less than or equal to 1",
        ),
    ],
)
def test_what_it_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        method_of(ConversionSection(method="r_sparse", **settings))
