"""Both stages of LTE: the terms by hand, nothing counted twice, the controller, and what contradicts a model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.methods.lte_training import (
    CLAMP,
    GroupMeter,
    GroupRecord,
    check_routers,
    efficiency,
    separability,
    set_soft,
)
from sparsify.models import SparseModel
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.sparsification import GroupRoutingSection, check_group_routing
from tests.models.test_group_router import GROUPS, routed
from tests.models.test_masking import CONFIGS

pytestmark = pytest.mark.usefixtures("one_rank")

IDS = torch.arange(60).view(2, 30)
GATES = st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5)


@given(GATES, st.floats(0.1, 0.9), st.randoms(use_true_random=False))
def test_both_terms_by_hand(rows: list[list[float]], tau: float, random: Any) -> None:
    weights = [random.uniform(0.1, 1) for _ in rows]
    gates = torch.tensor(rows, dtype=torch.float64)
    weighted = torch.tensor(weights, dtype=torch.float64)
    squares = [sum(g * g for g in row) / 3 for row in rows]
    poles = [sum(1 / max((g - tau) ** 2, CLAMP) for g in row) / 3 for row in rows]
    assert float(efficiency(gates)) == pytest.approx(sum(squares) / len(rows), rel=1e-12)
    assert float(separability(gates, tau)) == pytest.approx(sum(poles) / len(rows), rel=1e-9)
    mean = sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
    assert float(efficiency(gates, weighted)) == pytest.approx(mean, rel=1e-12)
    pole = sum(w * p for w, p in zip(weights, poles, strict=True)) / sum(weights)
    assert float(separability(gates, tau, weighted)) == pytest.approx(pole, rel=1e-9)
    separability(gates.requires_grad_(), tau).backward()
    assert gates.grad is not None
    # Away from the threshold, and nowhere infinite.
    for g, slope in zip(gates.detach().flatten().tolist(), gates.grad.flatten().tolist(), strict=True):
        assert math.isfinite(slope)
        assert slope * (g - tau) <= 0


def passed(model: SparseModel, soft: bool) -> tuple[list[float], GroupRecord, dict[str, torch.Tensor]]:
    """Both terms, the step's record, and the gradients of all router parameters."""
    set_soft(model, soft)
    model.zero_grad()
    with GroupMeter(model, IDS.device, soft=soft) as meter:
        loss = model(IDS, use_cache=False).logits.square().mean()
        terms = list(meter.terms()) if soft else [meter.nothing()]
        torch.stack([loss, *terms]).sum().backward()
        record = meter.reduce()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if ".group_router." in n and p.grad is not None}
    return [float(term) for term in terms], record, gradients


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_step_s_terms_are_means_over_tokens_groups_and_layers(kind: str) -> None:
    model = routed(kind).train()
    set_soft(model, True)
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    weights: dict[int, list[torch.Tensor]] = {}
    for layer, block in enumerate(model.ffn_blocks()):
        if kind == "mixtral":
            block.register_forward_pre_hook(
                lambda _, args, layer=layer: weights.setdefault(layer, []).extend(
                    args[2][torch.where(args[1] == e)] for e in torch.unique(args[1]).tolist()
                )
            )
        block.group_router.register_forward_hook(
            lambda _, args, scores, layer=layer: seen.setdefault(layer, []).append(scores.detach().flatten(0, -2))
        )
    (efficient, separable), record, gradients = passed(model, soft=True)
    wanted = [0.0, 0.0]
    for layer, calls in seen.items():
        gates = torch.cat(calls).double().sigmoid()
        own = torch.cat(weights[layer]).double() if weights else torch.ones(len(gates), dtype=torch.float64)
        wanted[0] += float(efficiency(gates, own)) / len(seen)
        wanted[1] += float(separability(gates, 0.5, own)) / len(seen)
        assert record.active[layer] == pytest.approx(float((gates > 0.5).double().mean()), abs=1e-5)
    assert efficient == pytest.approx(wanted[0], rel=1e-5)
    assert separable == pytest.approx(wanted[1], rel=1e-4)
    assert record.efficiency == pytest.approx(wanted[0], rel=1e-5)
    every = torch.cat([torch.cat(calls) for calls in seen.values()]).sigmoid()
    assert record.undecided == pytest.approx(float(((every - 0.5).abs() < 0.1).double().mean()), abs=1e-6)
    assert record.empty_tokens == pytest.approx(float((every <= 0.5).all(1).double().mean()), abs=1e-6)
    assert len(gradients) == 4
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpointed_layers_are_counted_once_and_have_the_same_gradients(kind: str) -> None:
    model = routed(kind).train()
    plain = passed(model, soft=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    again = passed(model, soft=True)
    assert plain[0] == pytest.approx(again[0], rel=1e-6)
    assert plain[1] == again[1]
    for name, gradient in plain[2].items():
        torch.testing.assert_close(gradient, again[2][name], rtol=1e-4, atol=1e-7)


def test_hard_groups_give_routers_a_gradient_of_zero_and_no_term() -> None:
    model = routed("mistral").train()
    terms, record, gradients = passed(model, soft=False)
    assert terms == [0.0]
    assert record.efficiency == record.separability == 0.0
    assert 0 < sum(record.active) / len(record.active) < 1
    assert len(gradients) == 4
    assert not any(gradient.any() for gradient in gradients.values())


def test_groups_that_are_all_off_are_counted_and_a_block_then_adds_nothing() -> None:
    model = routed("mistral").train()
    for block in model.ffn_blocks():
        block.group_router.bias.data.fill_(-50.0)
    _, record, _ = passed(model, soft=False)
    assert record.active == [0.0, 0.0]
    assert record.empty_tokens == 1.0
    block = model.ffn_blocks()[0]
    assert not block(torch.randn(1, 3, 32)).any()


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({"active_share": 0.5}, "group_routing.active_share=0.5 would be ignored"),
        ({"separability_weight": 1.0}, "group_routing.separability_weight=1.0 would be ignored"),
        ({"soft_tokens": 100}, "both null"),
        ({"soft_tokens": 100, "active_share": 0.5, "efficiency_weight": 1.0}, "both set"),
        ({"soft_tokens": 101, "active_share": 0.5}, "group_routing.soft_tokens is 101"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], given: str) -> None:
    with pytest.raises(RecipeError, match=given):
        check_group_routing(GroupRoutingSection(**settings), 100)


def test_a_model_without_routers_and_compiled_layers_are_refused() -> None:
    recipe = compose_recipe("quickstart_lte", [])
    with pytest.raises(RecipeError, match="the model stores no router of groups"):
        check_routers(recipe, SimpleNamespace(**routed("mistral").config.to_dict() | {"sparsification": None}))
    with pytest.raises(RecipeError, match="chooses groups by router_top_k"):
        check_routers(recipe, routed("mistral", "router_top_k").config)
    recipe.training.compile = True
    with pytest.raises(RecipeError, match=r"training\.compile is set"):
        check_routers(recipe, routed("mistral").config)
    assert GROUPS == 8
