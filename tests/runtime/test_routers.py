"""Models whose routers choose groups of neurons: steps and blocks read whole groups, and what would choose once more is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import ModelError
from sparsify.models.activations import ACTIVATIONS
from sparsify.models.quantised import BlockFormat
from sparsify.runtime import accelerate
from sparsify.runtime.ffn import FfnWeights, sparse_ffn
from sparsify.runtime.weights import Router
from tests.predictors.untrained import random_predictors
from tests.runtime.blocks import decoded_logits
from tests.runtime.test_copies import nearly_the_same
from tests.runtime.test_step import made

SIZE = 16
kinds = pytest.mark.parametrize("experts", [0, 3])
rules = pytest.mark.parametrize("rule", ["router", "router_top_k"])


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Steps are those of the compiled kernels."""


def routed(experts: int, rule: str = "router", **fields: Any) -> Any:
    """A model whose routers drop about two thirds of the groups."""
    sites: dict[str, Any] = {"group": {"rule": rule, "group_size": SIZE}} | fields.pop("sites", {})
    shape = {"hidden_size": 64, "intermediate_size": 192, "ffn_activation": "swiglu"}
    model = made(experts=experts, sparsification={"method": "lte", "sites": sites}, **shape | fields)
    torch.manual_seed(5)
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if ".group_router." in name:
            values.data.normal_(0, 0.2)
        if name.endswith("group_router.bias"):
            values.data.sub_(0.4)
        if name.endswith(("group_router.threshold", "kept_share")):
            values.data.fill_(0.4)
        elif name.endswith("threshold"):
            values.data.fill_(0.2)
    return model


@settings(max_examples=40)
@given(
    groups=st.integers(1, 9),
    size=st.integers(1, 7),
    hidden=st.sampled_from([8, 20, 64]),
    tokens=st.integers(1, 10),
    kept=st.one_of(st.none(), st.integers(1, 9)),
    activation=st.sampled_from(["drelu", "reglu", "swiglu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    threads=st.sampled_from([1, 3]),
    dense=st.booleans(),
    seed=st.integers(0, 999),
)
def test_the_kernel_reads_the_groups_that_any_token_keeps_and_computes_those_of_each(
    groups: int,
    size: int,
    hidden: int,
    tokens: int,
    kept: int | None,
    activation: str,
    dtype: Any,
    threads: int,
    dense: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    gate, up, down = (torch.randn(groups * size, hidden).to(dtype) for _ in range(3))
    kept = None if kept is None else min(kept, groups)
    router = Router(torch.randn(groups, hidden).to(dtype), torch.randn(groups), kept)
    x = torch.randn(tokens, hidden).to(dtype)
    weights = FfnWeights(gate, up, down, router=router)
    scores = x.float() @ router.weight.float().T + router.bias
    on = scores > 0 if kept is None else scores >= scores.sort(descending=True).values[:, kept - 1 : kept]
    by_neuron = on.repeat_interleave(size, 1)
    g, u = x.float() @ gate.float().T, x.float() @ up.float().T
    factor = torch.nn.functional.silu(g) if activation == "swiglu" else g.relu()
    expected = (factor * (u.relu() if activation == "drelu" else u) * by_neuron) @ down.float()
    for backend in ("native", "torch"):
        out, rows = sparse_ffn(x, weights, ACTIVATIONS[activation], backend=backend, threads=threads, dense=dense)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            out.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max() + 1)
        )
        if backend == "native":
            read = sum(int(part.any(0).sum()) for part in by_neuron.split(8))
            offered = -(-tokens // 8) * groups * size
            assert rows.gate == (offered if dense else read)
            assert rows.down <= rows.up <= rows.gate


@rules
@kinds
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_step_reads_whole_groups(experts: int, batch: int, rule: str, format: BlockFormat | None) -> None:
    model = routed(experts, rule)
    ids = torch.arange(3, 3 + 8 * batch).view(batch, 8)
    acceleration = accelerate(model, weights=format or "stored", keep_weights=format is None)
    if format is None:
        expected = decoded_logits(routed(experts, rule), ids)
    else:  # prompts multiply with what the blocks stand for
        with torch.no_grad():
            expected = model(ids).logits
    given_logits = decoded_logits(model, ids)
    assert model.forward.steps == 8
    nearly_the_same(given_logits, expected, format)
    for reads in acceleration.reads:
        assert 0 < reads.rows.down <= reads.rows.up == reads.rows.gate
        if batch == 1:  # of several tokens each reads others
            assert reads.rows.gate % SIZE == 0
            assert reads.rows.gate < 0.75 * reads.offered
        routers = reads.offered / SIZE * 64 * 4
        row_bytes = 64 * 4 if format is None else 64 * 8.5 / 8
        factors = (
            0 if format is None else reads.offered / model.config.intermediate_size * 64 * 4
        )  # fp32, of each output
        assert reads.bytes_read == pytest.approx(reads.rows.total * row_bytes + routers + factors)


@kinds
def test_a_router_sees_the_input_before_its_mask_and_other_masks_apply_inside_groups(experts: int) -> None:
    sites = {"ffn_in": {"rule": "top_k"}, "inter": {"rule": "threshold"}}
    model = routed(experts, sites=sites)
    expected = decoded_logits(model)
    acceleration = accelerate(model)
    nearly_the_same(decoded_logits(model), expected)
    # Gate and up may be read by the columns of what is left of their input, for all neurons.
    assert all(0 < reads.rows.down < reads.offered for reads in acceleration.reads)
    twin = copy.deepcopy(model)
    twin.model.norm.register_forward_hook(lambda *_: None)  # a hook makes every call go through the blocks
    nearly_the_same(decoded_logits(twin), expected)


@kinds
def test_dense_steps_read_every_row_under_the_same_routers(experts: int) -> None:
    model = routed(experts)
    expected = decoded_logits(model)
    acceleration = accelerate(model, dense=True)
    nearly_the_same(decoded_logits(model), expected)
    assert all(reads.rows.total == 3 * reads.offered for reads in acceleration.reads)


def test_half_precision_chooses_the_same_groups() -> None:
    model = routed(0, dtype=torch.bfloat16)
    expected = decoded_logits(model)
    accelerate(model)
    given_logits = decoded_logits(model)
    wrong = (given_logits - expected).abs().float().flatten(0, -2).amax(-1) / expected.abs().max()
    assert (wrong < 0.05).float().mean() >= 0.8


def test_predictors_would_choose_once_more() -> None:
    model = routed(0)
    predictors = random_predictors(model, 0.5)
    with pytest.raises(ModelError, match="predictors would choose once more"):
        accelerate(model, predictors=predictors.for_decoding(model, "here"))


def test_a_router_that_does_not_fit_is_refused() -> None:
    gate, up, down = (torch.randn(12, 8) for _ in range(3))
    for weight, bias in (
        (torch.randn(5, 8), torch.randn(5)),
        (torch.randn(4, 7), torch.randn(4)),
        (torch.randn(4, 8), torch.randn(3)),
    ):
        with pytest.raises(ValueError, match="router is"):
            sparse_ffn(
                torch.randn(2, 8), FfnWeights(gate, up, down, router=Router(weight, bias)), ACTIVATIONS["swiglu"]
            )
