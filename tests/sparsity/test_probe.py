"""The probe's streaming counts, compared with stored activations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sparsify.models import SparseModel
from sparsify.models.family import SparseMLP
from sparsify.models.fused_experts import SparseExperts
from sparsify.sparsity import ActivationStatistics, SparsityProbe

BuildModel = Callable[..., SparseModel]
Stored = dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]]
FACTORS = {
    "swiglu": (nn.functional.silu, lambda x: x),
    "reglu": (torch.relu, lambda x: x),
    "drelu": (torch.relu, torch.relu),
}


def store_pre_activations(model: SparseModel) -> Stored:
    """Stores gate and up of every (layer, expert), independent of the code under test."""
    stored: Stored = defaultdict(list)

    def store_dense(layer: int, mlp: SparseMLP, args: tuple[torch.Tensor]) -> None:
        hidden = args[0].flatten(0, 1)
        stored[layer, 0].append((mlp.gate_proj(hidden), mlp.up_proj(hidden)))

    def store_experts(layer: int, experts: SparseExperts, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, _ = args
        for expert, weight in enumerate(experts.get_parameter("gate_up_proj")):
            gate, up = nn.functional.linear(hidden[(chosen == expert).any(-1)], weight).chunk(2, -1)
            stored[layer, expert].append((gate, up))

    for layer, block in enumerate(model.model.layers):
        for module in block.modules():
            if isinstance(module, SparseMLP):
                module.register_forward_pre_hook(partial(store_dense, layer))
            if isinstance(module, SparseExperts):
                module.register_forward_pre_hook(partial(store_experts, layer))
    return stored


def probe_all(model: SparseModel, batches: list[torch.Tensor]) -> ActivationStatistics:
    with torch.no_grad(), SparsityProbe(model) as probe:
        for batch in batches:
            model(batch, use_cache=False)
    return probe.statistics()


def assert_equal(left: ActivationStatistics, right: ActivationStatistics) -> None:
    for name in ActivationStatistics.__dataclass_fields__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize("activation", ["swiglu", "reglu", "drelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counts_equal_brute_force(
    build_model: BuildModel,
    input_ids: torch.Tensor,
    kind: str,
    activation: str,
    dtype: torch.dtype,
) -> None:
    model = build_model(kind, activation, dtype)
    stored = store_pre_activations(model)
    statistics = probe_all(model, [input_ids[:1], input_ids[1:]])
    gate_of, up_of = FACTORS[activation]

    assert int(statistics.num_tokens) == input_ids.numel()
    assert len(stored) == statistics.num_layers * statistics.num_experts
    for (layer, expert), calls in stored.items():
        gate = gate_of(torch.cat([gate for gate, _ in calls]))
        up = up_of(torch.cat([up for _, up in calls]))
        product = gate * up
        block = statistics.select(layer, expert)
        assert int(block.routed_tokens) == len(product)
        assert torch.equal(block.gate_fired[0, 0], (gate != 0).sum(0))
        assert torch.equal(block.up_fired[0, 0], (up != 0).sum(0))
        assert torch.equal(block.product_fired[0, 0], (product != 0).sum(0))
        zeros = (product == 0).double().mean(1).numpy()
        for percent in (5, 50, 95):
            expected = np.percentile(zeros, percent, method="inverted_cdf")
            assert block.zero_share_percentile(percent) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_counts_do_not_depend_on_batches(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model = build_model(kind)
    whole = probe_all(model, [input_ids])
    assert_equal(probe_all(model, list(input_ids.flip(0).split(1))), whole)
    halves = [probe_all(model, [half]) for half in input_ids.split(2)]
    assert_equal(halves[1].merge(halves[0]), whole)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_padding_does_not_count(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model = build_model(kind)
    mask = torch.ones_like(input_ids, dtype=torch.bool)
    mask[:, 8:] = False  # causal attention: later tokens do not change earlier ones
    with torch.no_grad(), SparsityProbe(model) as probe:
        probe.count(mask)
        model(input_ids, use_cache=False)
        masked = probe.statistics()
        model(input_ids, use_cache=False)
        both = probe.statistics()
    assert_equal(masked, probe_all(model, [input_ids[:, :8]]))
    assert_equal(both, masked.merge(probe_all(model, [input_ids])))  # a mask holds for one pass


def test_mixtral_runs_eagerly_only_while_probed(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model("mixtral")
    model.config._experts_implementation = "grouped_mm"
    with SparsityProbe(model) as probe:
        assert model.config._experts_implementation == "eager"
        with pytest.raises(IndexError):
            model(input_ids + 1000)
    assert model.config._experts_implementation == "grouped_mm"
    assert int(probe.statistics().num_tokens) == 0


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_the_probe_does_not_change_the_model(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model = build_model(kind)
    model.config._experts_implementation = "eager"
    hooks = [hooks for one in model.modules() for hooks in (one._forward_hooks, one._forward_pre_hooks)]
    before = [list(one.values()) for one in hooks]
    expected = model(input_ids).logits
    with SparsityProbe(model) as probe:
        assert torch.equal(model(input_ids).logits, expected)
    model(input_ids)
    assert int(probe.statistics().num_tokens) == input_ids.numel()
    assert [list(one.values()) for one in hooks] == before


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_recomputation_in_the_backward_pass_does_not_count(
    build_model: BuildModel, input_ids: torch.Tensor, kind: str
) -> None:
    model = build_model(kind)
    expected = probe_all(model, [input_ids])
    model.train()
    model.activation_checkpointing_enable()
    with SparsityProbe(model) as probe:
        model(input_ids, labels=input_ids, use_cache=False).loss.backward()
    assert_equal(probe.statistics(), expected)


def test_failed_pass_does_not_leak_into_the_next(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model("mixtral")
    with torch.no_grad(), SparsityProbe(model) as probe:
        probe.count(torch.zeros_like(input_ids))
        with pytest.raises(IndexError):
            model(input_ids + 1000)
        model(input_ids, use_cache=False)
    assert_equal(probe.statistics(), probe_all(model, [input_ids]))


def test_finds_the_model_inside_a_wrapper(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model()
    with torch.no_grad(), SparsityProbe(nn.Sequential(model)) as probe:
        model(input_ids)
    assert int(probe.statistics().num_tokens) == input_ids.numel()
    with pytest.raises(ValueError, match="Linear"):
        SparsityProbe(nn.Linear(2, 2))
