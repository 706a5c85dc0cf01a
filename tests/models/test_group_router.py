"""Routers of groups: what they keep, what a block computes under them, and that a shipped model holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import check_activation, load_sparse
from sparsify.export.check import accept
from sparsify.models import FAMILIES, SiteRule, SparseModel, site_rules
from sparsify.models.group_router import GroupRouter, apply_groups
from tests.conftest import SHAPE
from tests.models.test_masking import CONFIGS, IDS, save

SIZE = 8
GROUPS = SHAPE["intermediate_size"] // SIZE


def routed(kind: str, rule: str = "router", seed: int = 3, **sites: Any) -> SparseModel:
    """A model of the same weights for every rule, whose routers score groups at random."""
    torch.manual_seed(0)
    stored: dict[str, Any] = {"group": {"rule": rule, "group_size": SIZE}} | sites
    config = CONFIGS[kind](**SHAPE, sparsification={"method": "test", "sites": stored})
    model = FAMILIES[config.model_type].model(config).eval()
    torch.manual_seed(seed)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if ".group_router." in name:
            last = name.rpartition(".")[2]
            values.data.fill_({"threshold": 0.5, "kept_share": 0.5}[last]) if last in (
                "threshold",
                "kept_share",
            ) else values.data.normal_(0, 0.5)
    return model


def make_router(rule: str, **parts: torch.Tensor) -> GroupRouter:
    return GroupRouter.holding(SiteRule(rule=rule, group_size=2), parts)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12), st.floats(0.05, 0.95))
def test_a_group_is_on_where_the_sigmoid_of_its_score_exceeds_the_threshold(scores: list[float], tau: float) -> None:
    router = make_router("router", threshold=torch.tensor([tau], dtype=torch.float64))
    given_scores = torch.tensor(scores, dtype=torch.float64)
    expected = 1 / (1 + (-given_scores).exp()) > tau
    assert torch.equal(router.kept(given_scores), expected)
    router.soft = True
    assert torch.allclose(router.factors(given_scores), 1 / (1 + (-given_scores).exp()), rtol=1e-12)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=12, unique=True), st.floats(0, 1, width=16))
def test_top_k_keeps_the_share_of_the_largest_scores(scores: list[float], share: float) -> None:
    router = make_router("router_top_k", kept_share=torch.tensor([share]))
    kept = router.kept(torch.tensor(scores))
    count = min(len(scores), max(1, round(float(torch.tensor(share)) * len(scores))))
    assert sorted(torch.tensor(scores)[kept].tolist()) == sorted(torch.tensor(scores).tolist())[-count:]


def test_scores_are_fp32_in_a_bf16_model_and_a_score_that_is_nan_keeps_its_group() -> None:
    torch.manual_seed(0)
    router = GroupRouter(SiteRule(rule="router", group_size=2), {"router": (3, 16), "bias": (3,), "threshold": (1,)})
    router.router.data.normal_()
    router = router.bfloat16()
    x = torch.randn(5, 16).bfloat16()
    scores = router(x)
    assert scores.dtype == torch.float32
    exact = x.double() @ router.router.double().T
    assert torch.allclose(scores.double(), exact, atol=1e-5)
    assert router.kept(torch.tensor([[torch.nan, -torch.inf]])).tolist() == [[True, False]]


def test_a_router_of_one_expert_is_that_one_s_also_of_routers_that_are_held() -> None:
    torch.manual_seed(0)
    parts = {"router": torch.randn(3, 4, 8), "bias": torch.randn(3, 4), "threshold": torch.tensor([0.5])}
    held = GroupRouter.holding(SiteRule(rule="router", group_size=2), parts)
    x = torch.randn(5, 8)
    for expert in range(3):
        own = held.of_expert(expert)
        assert torch.equal(own(x), held(x, expert))
        torch.testing.assert_close(own(x), x @ parts["router"][expert].T + parts["bias"][expert])


def test_neurons_of_dropped_groups_are_zero_whatever_they_are_and_soft_ones_are_multiplied() -> None:
    product = torch.tensor([[1.0, torch.nan, torch.inf, 4.0]], requires_grad=True)
    hard = apply_groups(product, torch.tensor([[True, False]]))
    assert hard[0, 0] == 1.0
    assert hard[0, 1].isnan()
    assert hard[0, 2:].tolist() == [0.0, 0.0]
    assert apply_groups(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[0.5, 2.0]])).tolist() == [[0.5, 1, 6, 8]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_block_computes_the_groups_that_its_router_keeps_and_no_others(kind: str) -> None:
    """Against one block computed by hand in fp64, group by group."""
    model = routed(kind).double()
    block = model.ffn_blocks()[0]
    x = torch.randn(6, SHAPE["hidden_size"], dtype=torch.float64)
    if kind == "mixtral":
        expert = 1
        index, weights = torch.full((6, 1), expert), torch.ones(6, 1, dtype=torch.float64)
        output = block(x, index, weights)
        gate, up = block.gate_up_proj[expert].chunk(2)
        down, router, bias = block.down_proj[expert], block.group_router.router[expert], block.group_router.bias[expert]
    else:
        output = block(x)
        gate, up, down = (getattr(block, f"{name}_proj").weight for name in ("gate", "up", "down"))
        router, bias = block.group_router.router, block.group_router.bias
    expected = torch.zeros_like(output)
    on = (x @ router.T + bias).sigmoid() > 0.5
    assert 0.2 < on.double().mean() < 0.8
    for group in range(GROUPS):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        h = torch.nn.functional.silu(x @ gate[rows].T) * (x @ up[rows].T)
        expected += on[:, group, None] * (h @ down[:, rows].T)
    assert torch.allclose(output, expected, atol=1e-12)


@pytest.mark.parametrize("rule", ["router", "router_top_k"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_routers_are_stored_with_the_weights(kind: str, rule: str, tmp_path: Path) -> None:
    model = routed(kind, rule)
    save(model, tmp_path)
    assert read_checkpoint(tmp_path).shapes == tensor_shapes(model.config)
    loaded = load_sparse(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.set_ffn_activation("reglu")
    check_activation(loaded, "reglu")
    loaded.ffn_blocks()[0].group_router = None
    with pytest.raises(RuntimeError, match="was patched"):
        check_activation(loaded, "reglu")


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_fresh_process_loads_routers_with_transformers_alone(kind: str, tmp_path: Path) -> None:
    model = routed(kind)
    save(model, tmp_path)
    with torch.no_grad():
        logits = model(IDS).logits.contiguous()
    save_file({"input_ids": IDS, "logits": logits}, tmp_path / "reference.safetensors")
    accepted = accept(tmp_path, "swiglu", ["fp32"], tmp_path / "reference.safetensors")
    assert accepted.logits_difference is not None
    assert accepted.logits_difference < 1e-6


@pytest.mark.parametrize(
    ("sites", "problem"),
    [
        ({"group": {"rule": "threshold", "group_size": 8}}, "the rule 'threshold'"),
        ({"inter": {"rule": "router", "group_size": 8}}, "the rule 'router'"),
        ({"group": {"rule": "router"}}, "groups of 0 neurons"),
        ({"inter": {"rule": "top_k", "group_size": 8}}, "groups of 8 neurons at inter"),
        ({"group": {"rule": "router", "group_size": 24}}, "groups of 24 among 64 neurons"),
        ({"group": {"rule": "router", "group_size": 8, "per": "channel"}}, "per channel"),
        ({"group": {"rule": "router", "group_size": 8}, "inter": {"by_proxy": True}}, "proxies of inter with a router"),
    ],
)
def test_what_a_router_cannot_choose_is_refused(sites: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CONFIGS["mistral"](**SHAPE, sparsification={"method": "test", "sites": sites})
    assert list(site_rules(routed("mistral", inter={"rule": "threshold"}).config)) == ["group", "inter"]
