"""LTE's conversion: the groups, routers that keep everything at first, and the untrained choice that it is compared with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sparsify.errors import RecipeError
from sparsify.methods.base import Mask, method_of
from sparsify.methods.calibrated_checkpoint import check_fits
from sparsify.methods.lte import GroupTopK, GroupTopKSettings, Lte, LteSettings
from sparsify.methods.remainder import ConstantRemainder
from sparsify.methods.sites import fit_block, reordered
from sparsify.models.masking import GROUP
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection
from tests.methods.blocks import NEURONS, random_block

SIZE = 4


def fitted(block: Any, mask: Any) -> tuple[list[Any], dict[str, torch.Tensor]]:
    experts, stored, _ = fit_block(mask, block.experts, block._inputs, torch.float32)
    return experts, stored[GROUP]


@given(st.permutations(range(NEURONS)))
def test_a_block_computes_the_same_in_any_order_of_its_neurons(order: list[int]) -> None:
    block = random_block([9])
    (expert,) = block.experts
    wide = reordered(expert, torch.tensor(order))
    x = block.x
    # Not bit by bit: BLAS may sum the last columns of a matrix in another order than the others.
    torch.testing.assert_close(wide.neurons(x), expert.neurons(x)[:, order], rtol=1e-5, atol=1e-5)
    assert torch.allclose(wide.output(x), expert.output(x), atol=1e-4)


@pytest.mark.parametrize("grouping", ["kmeans", "random"])
@pytest.mark.parametrize("tokens", [[64], [40, 33, 0]])
def test_the_converted_block_is_the_dense_one_and_its_routers_start_where_they_are_told(
    tokens: list[int], grouping: Any
) -> None:
    block = random_block(tokens)
    mask = Lte(LteSettings(group_size=SIZE, grouping=grouping, start_gate=0.8, start_spread=0.1))
    experts, parts = fitted(block, mask)
    assert isinstance(mask, Mask)
    for number, (expert, dense) in enumerate(zip(experts, block.experts, strict=True)):
        x = block.x[block.routes.of(number)[0]]
        assert torch.allclose(expert.output(x), dense.output(x), atol=1e-4)
        if not len(x):
            continue
        scores = expert.group_router(x)
        assert torch.allclose(scores.mean(0), torch.full((NEURONS // SIZE,), math.log(4)), atol=1e-4)
        assert torch.allclose(scores.std(0, correction=0), torch.full((NEURONS // SIZE,), 0.1), rtol=1e-3)
    assert parts["router"].shape[:-2] == (() if len(tokens) == 1 else (3,))
    assert parts["threshold"].tolist() == [0.5]


def test_an_expert_is_grouped_by_itself_and_kmeans_groups_are_tighter_than_random_ones() -> None:
    block = random_block([20, 20])
    spread = {}
    for grouping in ("kmeans", "random"):
        found = block.fit(Lte(LteSettings(group_size=SIZE, grouping=grouping)), GROUP)
        assert found.order is not None
        assert [sorted(order.tolist()) for order in found.order] == [list(range(NEURONS))] * 2
        spread[grouping] = found.record["group_spread"]
    assert all(one < 0.95 for one in spread["kmeans"])
    assert spread["random"] == [1.0, 1.0]


def test_untrained_top_k_keeps_the_groups_with_the_largest_mean_gate_product_by_a_loop() -> None:
    block = random_block([30])
    mask = GroupTopK(GroupTopKSettings(group_size=SIZE, target_zeros=0.6))
    (expert,), _ = fitted(block, mask)
    for x, h in zip(block.x, expert.neurons(block.x), strict=True):
        scores = [float((expert.gate[g * SIZE : (g + 1) * SIZE].double() @ x.double()).mean()) for g in range(5)]
        largest = sorted(range(5), key=lambda group: -scores[group])[:2]
        assert [g for g in range(5) if h[g * SIZE : (g + 1) * SIZE].any()] == sorted(largest)


def test_a_constant_replaces_what_dropped_groups_add_in_the_mean() -> None:
    block = random_block([50])
    mask = ConstantRemainder(GroupTopK(GroupTopKSettings(group_size=SIZE, target_zeros=0.6)))
    (expert,), _ = fitted(block, mask)
    assert torch.allclose(expert.output(block.x).mean(0), block.experts[0].output(block.x).mean(0), atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"group_size": 0}, {"grouping": "cosine"}, {"threshold": 1.0}, {"start_gate": 0.5}, {"start_spread": -1.0}],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        LteSettings(**settings)
    with pytest.raises(RecipeError) as refused:
        method_of(ConversionSection(calibration_tokens=64, method="lte", method_settings=settings))
    assert f"conversion.method_settings.{next(iter(settings))} is" in refused.value.given
    assert refused.value.allowed


def test_a_threshold_above_the_start_and_a_size_that_divides_no_block_are_refused(stock: dict[str, Path]) -> None:
    settings = {"threshold": 0.95}
    with pytest.raises(RecipeError, match=r"start_gate is 0\.9: it must exceed the threshold, 0\.95"):
        method_of(ConversionSection(calibration_tokens=64, method="lte", method_settings=settings))
    conversion = ConversionSection(calibration_tokens=64, method="lte", method_settings={"group_size": 48})
    source = ModelSection(source=str(stock["mistral"]))
    with pytest.raises(
        RecipeError, match="lte does not fit this model: sparsification has groups of 48 among 64 neurons"
    ):
        check_fits(conversion, source, ActivationSection("swiglu"))
