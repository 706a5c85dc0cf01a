from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.multiprocessing.spawn import start_processes

from sparsify.models import FfnActivation, SparseModel
from sparsify.models.family import SparseMLP
from sparsify.sparsity import ActivationStatistics, SparsityProbe

BuildModel = Callable[..., SparseModel]
NUM_NEURONS = 5


def assert_equal(left: ActivationStatistics, right: ActivationStatistics) -> None:
    for name in ActivationStatistics.__dataclass_fields__:
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def count(tokens: list[tuple[int, list[int]]]) -> ActivationStatistics:
    """Statistics of one layer of two experts from (expert, activations) of each token, one call per token."""
    statistics = ActivationStatistics.empty(1, 2, NUM_NEURONS)
    for expert, values in tokens:
        product = torch.tensor([values])
        statistics.add(0, expert, product.abs(), product, product, torch.tensor([3]))
    statistics.num_tokens.add_(len(tokens))
    return statistics


token_lists = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.lists(st.integers(-1, 1), min_size=NUM_NEURONS, max_size=NUM_NEURONS),
    ),
    max_size=12,
)


@settings(deadline=None, max_examples=60)
@given(token_lists, token_lists, token_lists)
def test_merging_is_exact_in_any_order(
    first: list[tuple[int, list[int]]],
    second: list[tuple[int, list[int]]],
    third: list[tuple[int, list[int]]],
) -> None:
    whole = count(first + second + third)
    assert_equal(count(first).merge(count(second)).merge(count(third)), whole)
    assert_equal(count(third).merge(count(second).merge(count(first))), whole)


@settings(deadline=None, max_examples=60)
@given(token_lists.filter(len))
def test_shares_are_those_of_the_values(tokens: list[tuple[int, list[int]]]) -> None:
    statistics = count(tokens)
    values = torch.tensor([values for _, values in tokens])
    assert statistics.zero_share() == pytest.approx(float((values == 0).double().mean()))
    assert statistics.layer_zero_shares() == pytest.approx([statistics.zero_share()])
    least, most = (values == 0).double().mean(1).min(), (values == 0).double().mean(1).max()
    assert least <= statistics.zero_share_percentile(50) <= most
    assert statistics.zero_share_percentile(100) == pytest.approx(float(most))


def test_symmetric_pre_activations_give_half_half_and_three_quarters_zeros() -> None:
    torch.manual_seed(0)
    activation = FfnActivation("drelu")
    gate, up = torch.randn(4000, 50), torch.randn(4000, 50)
    statistics = ActivationStatistics.empty(1, 1, 50)
    statistics.add(
        0,
        0,
        activation.gate_factor(gate),
        activation.up_factor(up),
        activation(gate, up),
        torch.zeros(4000, dtype=torch.int64),
    )
    assert statistics.zero_share("gate") == pytest.approx(0.5, abs=0.005)
    assert statistics.zero_share("up") == pytest.approx(0.5, abs=0.005)
    assert statistics.zero_share("product") == pytest.approx(0.75, abs=0.005)


def test_dead_and_always_on_neurons(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model()
    with torch.no_grad():
        # Feature 0 of the residual stream is large and positive for every token.
        model.model.embed_tokens.weight[:, 0] = 100.0
        mlp = model.get_submodule("model.layers.1.mlp")
        assert isinstance(mlp, SparseMLP)
        mlp.gate_proj.weight[3] = 0.0
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[7] = 0.0
            projection.weight[7, 0] = 1.0
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(input_ids)
    statistics = probe.statistics()
    assert statistics.dead_neurons()[1, 0, 3]
    assert not statistics.always_on_neurons()[1, 0, 3]
    assert statistics.always_on_neurons()[1, 0, 7]
    assert statistics.firing_rates()[1, 0, 7] == 1
    assert statistics.firing_rates()[1, 0, 3] == 0


def test_expert_without_tokens_has_neither_dead_nor_always_on_neurons() -> None:
    statistics = count([(0, [0, 1, 1, 0, 1]), (0, [0, 1, 0, 1, 1])])
    assert statistics.dead_neurons().sum() == 1
    assert statistics.always_on_neurons().sum() == 2
    assert not statistics.dead_neurons()[0, 1].any()
    assert not statistics.always_on_neurons()[0, 1].any()
    assert statistics.firing_rates()[0, 1].isnan().all()


def test_summary_is_a_line_of_json(build_model: BuildModel, input_ids: torch.Tensor) -> None:
    model = build_model("mixtral")
    with torch.no_grad(), SparsityProbe(model) as probe:
        model(input_ids)
    summary = json.loads(json.dumps(probe.statistics().summary()))
    assert summary["num_tokens"] == input_ids.numel()
    assert summary["zeros"] == pytest.approx(sum(summary["layers"]) / len(summary["layers"]))
    assert summary["zeros"] >= max(summary["gate_zeros"], summary["up_zeros"])


def _reduce_on_rank(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    tokens = [(0, [1, 0, 0, 1, 0])] if rank == 0 else [(1, [0] * 5), (0, [1, 1, 1, 1, 1])]
    torch.save(vars(count(tokens).reduce()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_reduce_sums_over_ranks(tmp_path: Path) -> None:
    # Forked, since two new processes would spend their time on imports.
    start_processes(_reduce_on_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    whole = count([(0, [1, 0, 0, 1, 0]), (1, [0] * 5), (0, [1, 1, 1, 1, 1])])
    for rank in range(2):
        assert_equal(ActivationStatistics(**torch.load(tmp_path / f"{rank}.pt")), whole)


def test_reduce_without_ranks_changes_nothing() -> None:
    statistics = count([(0, [1, 0, 0, 1, 0])])
    assert_equal(statistics.reduce(), statistics)


def test_gaussian_factors_have_the_causes_of_fair_coins() -> None:
    torch.manual_seed(0)
    activation = FfnActivation("drelu")
    gate, up = torch.randn(4000, 50) + 0.5, torch.randn(4000, 50)
    statistics = ActivationStatistics.empty(1, 1, 50)
    factors = activation.gate_factor(gate), activation.up_factor(up), activation(gate, up)
    statistics.add(0, 0, *factors, positions=torch.arange(4000))
    silent = float(torch.distributions.Normal(0, 1).cdf(torch.tensor(-0.5)))
    assert statistics.zero_causes() == pytest.approx(
        {"gate_only": silent / 2, "up_only": (1 - silent) / 2, "both": silent / 2, "underflow": 0},
        abs=0.005,
    )


@settings(deadline=None, max_examples=60)
@given(token_lists.filter(len))
def test_causes_sum_to_the_zeros_with_underflow_separate(
    tokens: list[tuple[int, list[int]]],
) -> None:
    statistics = ActivationStatistics.empty(1, 2, NUM_NEURONS)
    for expert, values in tokens:
        gate = torch.tensor([values]) * 1e-30
        statistics.add(0, expert, gate, gate.abs(), gate * gate.abs(), torch.tensor([0]))
    causes = statistics.zero_causes()
    assert sum(causes.values()) == pytest.approx(statistics.zero_share()) == pytest.approx(1.0)
    assert causes["gate_only"] == causes["up_only"] == 0
    assert causes["underflow"] == pytest.approx(1 - statistics.zero_share("gate"))


def test_zeros_by_position() -> None:
    statistics = ActivationStatistics.empty(1, 1, 4)
    positions = torch.tensor([0, 1, 2, 3, 4, 0, 2**19, 2**22])
    product = torch.tensor([[1.0] * 4, [0.0] * 4] * 4)
    statistics.add(0, 0, product, product, product, positions)
    assert statistics.position_zero_shares() == {
        0: (2, 0.5),
        1: (1, 1.0),
        2: (2, 0.5),
        4: (1, 0.0),
        2**19: (2, 0.5),
    }


@pytest.mark.parametrize("num_tokens", [1, 30, 3000])
def test_a_neuron_at_the_bound_is_missed_once_in_twenty(num_tokens: int) -> None:
    statistics = count([(0, [0, 1, 1, 1, 1])] * num_tokens)
    bound = statistics.firing_rate_bound()
    assert (1 - bound) ** num_tokens == pytest.approx(0.05)
    if num_tokens > 100:
        assert bound == pytest.approx(3 / num_tokens, rel=0.01)  # the rule of three
