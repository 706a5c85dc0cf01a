"""The blended swap: dense at the first token, the plain activation at the last, and saved as what it will be."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.methods.blending import blend, blended_share, plain
from sparsify.models import ACTIVATIONS, FfnActivation, SparseModel
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.sparsity.probe import SparsityProbe

IDS = torch.arange(60).view(2, 30)
KINDS = ["mistral", "mixtral"]


@cache
def quickstart() -> Recipe:
    return compose_recipe("recovery/drelu")


def recipe_of(share: float) -> Recipe:
    return compose_recipe("recovery/drelu", [f"blending.budget_share={share}"])


def logits(model: SparseModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "swiglu"])
def test_it_begins_dense_and_ends_plain_to_the_bit(kind: str, name: str, stock: dict[str, Path]) -> None:
    recipe = recipe_of(0.5)
    recipe.activation.ffn_activation = name
    dense, sparse, model = (load_sparse(stock[kind], way) for way in ("swiglu", name, name))
    assert blend(model, recipe, 0) == 0
    assert torch.equal(logits(model), logits(dense))
    blend(model, recipe, recipe.training.budget_tokens // 4)
    assert not torch.equal(logits(model), logits(dense))
    assert not torch.equal(logits(model), logits(sparse))
    assert blend(model, recipe, recipe.training.budget_tokens // 2) == 1
    assert torch.equal(logits(model), logits(sparse))
    assert {type(block.ffn_activation) for block in model.ffn_blocks()} == {FfnActivation}
    for block, fresh in zip(model.ffn_blocks(), sparse.ffn_blocks(), strict=True):
        assert vars(block.ffn_activation).keys() == vars(fresh.ffn_activation).keys()


def test_the_guard_refuses_what_is_still_on_its_way(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    blend(model, recipe_of(0.5), 2048)
    with pytest.raises(RuntimeError, match="does not apply drelu"):
        check_activation(model, "drelu")
    with plain(model):
        check_activation(model, "drelu")
        assert torch.equal(logits(model), logits(load_sparse(stock["mistral"], "drelu")))
    with pytest.raises(RuntimeError):
        check_activation(model, "drelu")


def test_what_was_blended_before_an_interruption_does_not_matter(stock: dict[str, Path]) -> None:
    recipe = recipe_of(0.5)
    whole, resumed = (load_sparse(stock["mistral"], "drelu") for _ in range(2))
    for seen in (0, 10_240, 40_960):
        blend(whole, recipe, seen)
    blend(resumed, recipe, 40_960)
    assert torch.equal(logits(whole), logits(resumed))


def test_the_probe_sees_the_zeros_that_there_are(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    blend(model, recipe_of(0.5), 20_480)
    with SparsityProbe(model) as probe:
        logits(model)
    assert probe.statistics().zero_share("product") == 0
    with plain(model), SparsityProbe(model) as probe:
        logits(model)
    assert probe.statistics().zero_share("product") > 0.5


@given(st.floats(0.01, 0.99), st.integers(0, 204_800), st.integers(0, 204_800))
def test_the_share_only_ever_rises_and_is_whole_before_the_end(share: float, seen: int, later: int) -> None:
    recipe = deepcopy(quickstart())
    recipe.training.budget_tokens, recipe.training.global_batch_size = 204_800, 8
    recipe.training.sequence_length, recipe.blending.budget_share = 256, share
    now, then = blended_share(recipe, seen), blended_share(recipe, seen + later)
    assert 0 <= now <= then <= 1
    assert blended_share(recipe, 0) == 0
    assert blended_share(recipe, 204_800) == 1
