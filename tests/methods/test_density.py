"""Weight density: against counts by hand, and the zeros that are solved for a wanted density, through convert."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import RecipeError
from sparsify.methods import base
from sparsify.methods.base import Fitted, LayerValues, MethodSettings
from sparsify.methods.density import method_density, weight_density, with_target_zeros
from sparsify.models import SITES, SiteRule, SparseMistralConfig, SparseMixtralConfig
from sparsify.models.masking import INPUTS
from sparsify.recipe.sparsification import ConversionSection
from tests.methods.conftest import Calibrate
from tests.runtime.blocks import IDS

SHAPE: dict[str, Any] = {
    "hidden_size": 8,
    "intermediate_size": 20,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "vocab_size": 50,
}
# q and o are 8 x 8, k and v 4 x 8, and each projection of the block 20 x 8.
Q, K, V, O, GATE, UP, DOWN = 64, 32, 32, 64, 160, 160, 160  # noqa: E741
ALL = Q + K + V + O + GATE + UP + DOWN
DENSE = SparseMistralConfig(**SHAPE)
MIXTURE = SparseMixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2)


@pytest.mark.parametrize(
    ("kept", "read"),
    [
        ({}, ALL),
        ({"attn_in": 0.5}, ALL - (Q + K + V) / 2),
        ({"attn_in.q": 0.5, "attn_out": 0.25}, ALL - Q / 2 - O * 0.75),
        ({"attn_in.k": 0.0, "attn_in.v": 0.5}, ALL - K - V / 2),
        ({"ffn_in": 0.5}, ALL - (GATE + UP) / 2),
        ({"ffn_in.gate": 0.25, "ffn_in.up": 0.5}, ALL - GATE * 0.75 - UP / 2),
        ({"gate": 0.25}, ALL - (UP + DOWN) * 0.75),
        ({"up": 0.25}, ALL - (GATE + DOWN) * 0.75),
        ({"inter": 0.25}, ALL - DOWN * 0.75),
        ({"gate": 0.5, "inter": 0.25}, ALL - UP / 2 - DOWN * 0.75),
        ({"gate": 0.25, "inter": 0.5}, ALL - (UP + DOWN) * 0.75),
        ({"gate": 0.5, "up": 0.25}, ALL - (GATE + DOWN) * 0.75),
        ({"ffn_in": 0.5, "gate": 0.25}, ALL - GATE / 2 - UP * 0.875 - DOWN * 0.75),
        ({"ffn_in": 0.5, "inter": 0.5}, ALL - (GATE + UP + DOWN) / 2),
        (dict.fromkeys(SITES, 0.0), 0),
    ],
)
def test_what_a_token_reads_by_hand(kept: dict[str, float], read: float) -> None:
    assert weight_density(DENSE, kept) == pytest.approx(read / ALL)


def test_of_a_mixture_the_experts_that_a_token_is_routed_to_count() -> None:
    attention, block = Q + K + V + O, GATE + UP + DOWN
    assert weight_density(MIXTURE, {}) == 1.0
    assert weight_density(MIXTURE, {"inter": 0.5}) == pytest.approx(1 - DOWN / (attention + 2 * block))
    assert weight_density(MIXTURE, {"attn_out": 0.5}) == pytest.approx(1 - O / 2 / (attention + 2 * block))


def test_what_rules_read_in_addition() -> None:
    kept = {"attn_in": 0.5, "ffn_in": 0.5, "inter": 0.5}
    rules = {site: SiteRule(rule="top_k", rotated=site != "inter") for site in kept}
    plain = weight_density(DENSE, kept)
    assert weight_density(DENSE, kept, rules) == pytest.approx(plain + 2 * 8 * 8 / ALL)
    by_proxy = {"inter": SiteRule(by_proxy=True)}
    copies = 4.5 / 16 * (GATE + UP)
    read = ALL - 0.75 * (GATE + UP + DOWN) + copies
    assert weight_density(DENSE, {"inter": 0.25}, by_proxy) == pytest.approx(read / ALL)
    low_rank = {site: SiteRule(remainder="low_rank", rank=3) for site in ("attn_in.k", "ffn_in.up")}
    read = 3 * (8 + 4) + 3 * (8 + 20)
    assert weight_density(DENSE, {}, low_rank) == pytest.approx(1 + read / ALL)
    routed = 3 * (8 + 4) + 2 * 3 * (8 + 20)
    assert weight_density(MIXTURE, {}, low_rank) == pytest.approx(1 + routed / (Q + K + V + O + 2 * (GATE + UP + DOWN)))


@given(st.dictionaries(st.sampled_from(SITES), st.floats(0, 1)), st.sampled_from(SITES), st.floats(0, 1))
def test_keeping_less_never_reads_more(kept: dict[str, float], site: str, factor: float) -> None:
    shared = {name for name in kept if "." in name and name.partition(".")[0] in kept}
    kept = {name: share for name, share in kept.items() if name not in shared}
    if site not in kept:
        return
    less = kept | {site: kept[site] * factor}
    assert 0 <= weight_density(DENSE, less) <= weight_density(DENSE, kept) + 1e-12 <= 1 + 1e-12


@pytest.mark.parametrize("kept", [{"inner": 0.5}, {"inter": 1.5}, {"inter": float("nan")}])
def test_what_is_not_a_share_of_a_site(kept: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="0 to 1"):
        weight_density(DENSE, kept)


class UnevenSettings(MethodSettings):
    target_zeros: float = Field(ge=0, le=0.6)
    site: Literal["attn_in", "ffn_in"] = "attn_in"


class Uneven:
    """A mask that drops a fifth more of one input than of the product, and rotates that input."""

    name = "uneven"
    paper = "none"
    Settings = UnevenSettings
    reconstructs = False

    def __init__(self, settings: UnevenSettings) -> None:
        self._settings = settings

    @property
    def sites(self) -> dict[str, SiteRule]:
        return {self._settings.site: SiteRule(rule="top_k", rotated=True), "inter": SiteRule(rule="top_k")}

    @property
    def kept_shares(self) -> dict[str, float]:
        zeros = self._settings.target_zeros
        return {self._settings.site: 1 - 1.2 * zeros, "inter": 1 - zeros}

    def fit(self, site: str, layer: LayerValues) -> Fitted:
        raise NotImplementedError


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    base.methods()
    monkeypatch.setitem(base._METHODS, Uneven.name, Uneven)


@pytest.mark.parametrize(
    ("settings", "read_per_zeros"),
    [
        ({"method": "percentile"}, DOWN),
        ({"method": "thresholds"}, DOWN),
        ({"method": "percentile", "method_settings": {"site": "gate"}}, UP + DOWN),
    ],
)
def test_zeros_are_solved_for_a_density(settings: dict[str, Any], read_per_zeros: int) -> None:
    solved = with_target_zeros(ConversionSection(target_density=0.9, **settings), DENSE)
    assert solved.target_density is None
    assert solved.target_zeros == pytest.approx(0.1 * ALL / read_per_zeros, abs=1e-5)
    assert method_density(DENSE, solved) == pytest.approx(0.9, abs=1e-5)


def test_a_method_says_what_it_keeps_and_what_it_reads_counts(uneven: None) -> None:
    solved = with_target_zeros(ConversionSection(method="uneven", target_density=1.0 - 0.02), DENSE)
    assert solved.target_zeros is not None
    assert (1.2 * (Q + K + V) + DOWN) * solved.target_zeros == pytest.approx(0.02 * ALL + 8 * 8, abs=0.01)
    with pytest.raises(RecipeError, match="cannot read so little") as refused:
        with_target_zeros(ConversionSection(method="uneven", target_density=0.5), DENSE)
    smallest = 1 - (0.6 * (1.2 * (Q + K + V) + DOWN) - 8 * 8) / ALL
    assert f"Above {smallest:.3f}" in refused.value.allowed


def test_a_density_that_a_mask_cannot_reach_names_the_smallest() -> None:
    conversion = ConversionSection(method="percentile", method_settings={"site": "gate"}, target_density=0.3)
    with pytest.raises(RecipeError, match=r"target_density is 0\.3, and percentile cannot") as refused:
        with_target_zeros(conversion, DENSE)
    assert f"Above {(Q + K + V + O + GATE) / ALL:.3f}" in refused.value.allowed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "percentile", "target_zeros": 0.5}, "both say how much"),
        ({"method": "calibrated_replacement"}, "is not a mask"),
        ({"method": "percentile", "method_settings": {"site": "up"}}, "'inter' or 'gate'"),
    ],
)
def test_a_density_next_to_what_it_cannot_be_with(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        with_target_zeros(ConversionSection(target_density=0.9, **settings), DENSE)


def test_a_density_of_1_leaves_every_bit(calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path) -> None:
    found = calibrate("mixtral", "swiglu", tmp_path / "out", tokens=640, method="percentile", target_density=1.0)
    with torch.no_grad():
        logits = load_sparse(found.folder)(IDS).logits
        assert torch.equal(logits, load_sparse(stock["mixtral"])(IDS).logits)
    with pytest.raises(RecipeError, match="which masks nothing"):
        with_target_zeros(ConversionSection(method="thresholds", target_density=1.0), DENSE)


def test_a_conversion_to_a_density_is_that_to_its_zeros(
    calibrate: Calibrate, stock: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sparsify")
    found = calibrate("mistral", "swiglu", tmp_path / "density", tokens=640, method="percentile", target_density=0.8)
    config = load_sparse(found.folder).config
    solved = with_target_zeros(ConversionSection(method="percentile", target_density=0.8), config)
    assert f"0.800 of the weights with target_zeros={solved.target_zeros:.4f}" in caplog.text
    again = calibrate(
        "mistral", "swiglu", tmp_path / "zeros", tokens=640, method="percentile", target_zeros=solved.target_zeros
    )
    assert again.calibration == found.calibration
    kept = {"inter": 1 - found.calibration.stages[-1].zeros}
    assert weight_density(config, kept) == pytest.approx(0.8, abs=0.01)


def test_all_sites_that_are_inputs_cover_each_projection_once() -> None:
    alone = [name for site, names in INPUTS.items() if site not in ("attn_in", "ffn_in") for name in names]
    assert sorted(alone) == sorted({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"})
