"""Hidden-dimension routing by loops in float64, its laws, and the identity start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.architecture import sparse_config
from sparsify.errors import ModelError
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM
from sparsify.models.sparse_mohd import GroupFusion, HiddenRouter, SparseMohdConfig, SparseMohdForCausalLM
from tests.conftest import SHAPE

IDS = torch.randint(3, 2000, (2, 20), generator=torch.Generator().manual_seed(0))


def config(**fields: Any) -> SparseMohdConfig:
    return SparseMohdConfig(**SHAPE | fields)


def random_router(seed: int = 0, **fields: Any) -> HiddenRouter:
    torch.manual_seed(seed)
    router = HiddenRouter(config(**fields)).double()
    torch.nn.init.normal_(router.centroids.weight, std=0.3)
    return router


@pytest.mark.parametrize("gate_scale", ["sum", "mean"])
def test_a_router_by_loops(gate_scale: str) -> None:
    router = random_router(sub_dimensions=8, shared_sub_dimensions=2, active_sub_dimensions=5, gate_scale=gate_scale)
    x = torch.randn(6, 32, dtype=torch.float64)
    with torch.no_grad():
        routed, on, logits = router(x)
    for row, token in enumerate(x.tolist()):
        scores = [
            sum(c * v for c, v in zip(centroid, token, strict=True)) for centroid in router.centroids.weight.tolist()
        ]
        total = sum(math.exp(score) for score in scores)
        shares = [math.exp(score) / total for score in scores]
        kept = {0, 1, *sorted(range(2, 8), key=lambda i: -shares[i])[:3]}
        assert {i for i in range(8) if on[row, i]} == kept
        chosen = sum(shares[i] for i in kept)
        for channel, value in enumerate(token):
            part = channel // 4
            scale = 8 * chosen if gate_scale == "sum" else 5 / chosen
            expected = value * shares[part] * scale if part in kept else 0.0
            # Gates are computed in fp32.
            assert float(routed[row, channel]) == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(logits, x @ router.centroids.weight.T)


@settings(max_examples=40)
@given(st.data())
def test_laws_of_routing(data: st.DataObject) -> None:
    parts = data.draw(st.sampled_from([1, 2, 4, 8, 16]))
    active = data.draw(st.integers(1, parts))
    shared = data.draw(st.integers(0, active))
    scale = data.draw(st.sampled_from(["sum", "mean"]))
    seed = data.draw(st.integers(0, 1000))
    router = random_router(
        seed, sub_dimensions=parts, shared_sub_dimensions=shared, active_sub_dimensions=active, gate_scale=scale
    )
    x = torch.randn(5, 32, dtype=torch.float64)
    routed, on, logits = router(x)
    gates = router.gates(logits, on)
    assert on.sum(-1).tolist() == [active] * 5
    assert bool(on[:, :shared].all())
    assert bool((gates[~on] == 0).all())
    assert bool((routed.unflatten(-1, (parts, -1))[~on] == 0).all())
    if shared < active < parts:
        lowest_on = torch.where(on, logits, torch.inf)[:, shared:].min(-1).values
        assert bool((lowest_on >= torch.where(on, -torch.inf, logits)[:, shared:].max(-1).values).all())
    total = gates.sum(-1)
    expected = (
        parts * logits.softmax(-1).where(on, torch.zeros(())).sum(-1) ** 2
        if scale == "sum"
        else torch.full((5,), active)
    )
    torch.testing.assert_close(total.double(), expected.double(), rtol=1e-5, atol=1e-5)
    if shared == active:  # nothing is chosen: the same channels for every token
        assert bool((on == on[:1]).all())


@pytest.mark.parametrize("gate_scale", ["sum", "mean"])
def test_all_on_with_even_shares_is_the_identity(gate_scale: str) -> None:
    router = random_router(active_sub_dimensions=16, gate_scale=gate_scale)
    torch.nn.init.zeros_(router.centroids.weight)
    x = torch.randn(4, 32)
    routed, on, _ = router.float()(x)
    assert torch.equal(routed, x)
    assert torch.equal(GroupFusion(config())(x, on), x)


def test_a_fusion_by_loops_reads_what_is_on_alone() -> None:
    torch.manual_seed(0)
    fusion = GroupFusion(config(sub_dimensions=4, shared_sub_dimensions=1, active_sub_dimensions=2)).double()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter)
    y, on = torch.randn(3, 32, dtype=torch.float64), torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool()
    expected = torch.zeros(3, 4, 8, dtype=torch.float64)
    for token in range(3):
        for n in (n for n in range(4) if on[token, n]):
            for d in range(8):
                mixed = sum(float(y[token, 8 * n + c]) * float(fusion.within[n, c, d]) for c in range(8))
                for m in range(4):
                    expected[token, m, d] += mixed * float(fusion.across[d, n, m])
    torch.testing.assert_close(fusion(y, on), expected.flatten(1))
    other = torch.where(on.repeat_interleave(8, 1), y, 1e30)
    assert torch.equal(fusion(other, on), fusion(y, on)), "what is off is not read"


def test_a_static_slice_is_the_narrower_model_in_its_blocks() -> None:
    """k_spec = 0 and even shares: blocks read the first channels, and write them alone."""
    torch.manual_seed(0)
    model = (
        SparseMohdForCausalLM(config(shared_sub_dimensions=8, active_sub_dimensions=8, gate_scale="mean"))
        .double()
        .eval()
    )
    layer = model.model.layers[0]
    for router in (layer.attention_router, layer.ffn_router):
        torch.nn.init.zeros_(router.centroids.weight)
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    routed, on, _ = layer.ffn_router(layer.post_attention_layernorm(x))
    block = layer.mlp
    narrow = layer.post_attention_layernorm(x)[..., :16]
    gate, up = narrow @ block.gate_proj.weight[:, :16].T, narrow @ block.up_proj.weight[:, :16].T
    written = (torch.nn.functional.silu(gate) * up) @ block.down_proj.weight[:16].T
    found = layer.ffn_fusion(block(routed), on)
    torch.testing.assert_close(found[..., :16], written)
    assert bool((found[..., 16:] == 0).all())


@pytest.mark.parametrize("tied", [False, True])
def test_at_full_activation_it_is_the_dense_model(tied: bool) -> None:
    torch.manual_seed(0)
    dense = SparseMistralForCausalLM(SparseMistralConfig(**SHAPE, tie_word_embeddings=tied, sliding_window=None)).eval()
    model = SparseMohdForCausalLM(config(active_sub_dimensions=16, tie_word_embeddings=tied)).eval()
    model.load_state_dict(dense.state_dict(), strict=False)
    for layer in model.model.layers:
        for router in (layer.attention_router, layer.ffn_router):
            torch.nn.init.zeros_(router.centroids.weight)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)


def test_a_token_sees_only_tokens_before_it_and_the_cache_changes_nothing() -> None:
    torch.manual_seed(0)
    model = SparseMohdForCausalLM(config()).eval()
    with torch.no_grad():
        whole = model(IDS).logits
        torch.testing.assert_close(model(IDS[:, :9]).logits, whole[:, :9], atol=1e-5, rtol=1e-4)
        start = model(IDS[:, :9], use_cache=True)
        after = model(IDS[:, 9:], past_key_values=start.past_key_values).logits
    torch.testing.assert_close(after, whole[:, 9:], atol=1e-5, rtol=1e-4)


def test_every_parameter_learns_with_and_without_checkpointing() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = SparseMohdForCausalLM(config(gate_scale="mean")).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})  # pyright: ignore[reportCallIssue]
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert not [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum()]
        gradients.append([one.grad for one in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"sub_dimensions": 5}, "sub_dimensions is 5, which does not divide hidden_size 32"),
        ({"sub_dimensions": 0}, "sub_dimensions is '0'"),
        ({"shared_sub_dimensions": 9}, "no more can be shared than are active"),
        ({"shared_sub_dimensions": 0, "active_sub_dimensions": 0}, "active_sub_dimensions is '0'"),
        ({"active_sub_dimensions": 17}, "active_sub_dimensions 17, of 16"),
        ({"gate_scale": "max"}, "gate_scale is 'max', not one of sum, mean"),
        ({"sub_dimensions": "many"}, "sub_dimensions is 'many'"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_one_message(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError) as caught:
        sparse_config(SHAPE | {"model_type": "sparse_mohd"} | fields, "swiglu", "model.architecture")
    assert reason in str(caught.value)
    assert "model.architecture" in str(caught.value)
