"""Neurons shared between tokens, compared with stored firings counted by simple, slow code."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.models import SparseModel
from sparsify.sparsity import ActivationStatistics, SparsityProbe
from sparsify.sparsity.consecutive import (
    CHUNK_TOKENS,
    REUSE_TOKENS,
    ConsecutiveObserver,
    ConsecutiveStatistics,
)
from tests.sparsity.test_probe import FACTORS

BuildModel = Callable[..., SparseModel]
POSITIONS = torch.tensor([[*range(7), *range(5)], [*range(12)], [*range(2), *range(10)]])


def observe(model: SparseModel, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> ConsecutiveStatistics:
    experts = getattr(model.config, "num_local_experts", 1)
    observer = ConsecutiveObserver(3, experts, model.config.intermediate_size)
    with torch.no_grad(), SparsityProbe(model, observer):
        for tokens, positions in batches:
            model(tokens, position_ids=positions, use_cache=False)
    return observer.statistics


def stored_firings(model: SparseModel, tokens: torch.Tensor) -> torch.Tensor:
    """[layers, batch, tokens, experts * neurons], independent of the code under test."""
    fired: list[torch.Tensor] = []
    gate_of, up_of = FACTORS[model.config.ffn_activation]

    def dense(block: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
        fired.append((gate_of(block.gate_proj(args[0])) * up_of(block.up_proj(args[0])) != 0)[None])

    def experts(block: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, _ = args
        gate, up = torch.einsum("th,enh->ten", hidden, block.gate_up_proj).chunk(2, -1)
        routed = torch.zeros(len(hidden), 4, dtype=torch.bool).scatter(1, chosen, True)
        both = (gate_of(gate) * up_of(up) != 0) & routed.unsqueeze(-1)
        fired.append(both.view(1, *tokens.shape, -1))

    kind = dense if model.config.model_type == "sparse_mistral" else experts
    handles = [block.register_forward_pre_hook(kind) for block in model.ffn_blocks()]
    with torch.no_grad():
        model(tokens, position_ids=POSITIONS, use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat(fired)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_unions_and_reuse_equal_brute_force(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model, tokens = build_model(kind), input_ids[:3]
    fired = stored_firings(model, tokens)
    statistics = observe(model, [(tokens, POSITIONS)])
    unions = statistics.chunk_unions(fired.shape[-1])
    for length, (num_chunks, union) in zip(CHUNK_TOKENS, unions, strict=True):
        chunks = [
            fired[:, row, start : start + length].any(1).double().mean()
            for row in range(3)
            for start in range(0, 12 - length + 1, length)
            if POSITIONS[row, start + length - 1] - POSITIONS[row, start] == length - 1
        ]
        assert num_chunks == len(chunks)
        if chunks:
            assert union == pytest.approx(float(torch.stack(chunks).mean()))
    assert unions[2][0] == 7  # four tokens: two of the nine chunks cross the end of a document
    now, again = 0, [0] * len(REUSE_TOKENS)
    for row in range(3):
        for at in range(5, 12):
            if POSITIONS[row, at] >= 5:
                now += int(fired[:, row, at].sum())
                for index, back in enumerate(REUSE_TOKENS):
                    before = fired[:, row, at - back : at].any(1)
                    again[index] += int((fired[:, row, at] & before).sum())
    assert statistics.reuse() == pytest.approx([count / now for count in again])


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
def test_counts_do_not_depend_on_batches_or_order(build_model: BuildModel, input_ids: torch.Tensor, kind: str) -> None:
    model, tokens = build_model(kind), input_ids[:3]
    whole = observe(model, [(tokens, POSITIONS)])
    rows = [(tokens[i : i + 1], POSITIONS[i : i + 1]) for i in (2, 0, 1)]
    single = observe(model, rows)
    for name, count in vars(whole).items():
        assert torch.equal(count, getattr(single, name)), name


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.booleans(), min_size=4, max_size=4).map(lambda row: [float(x) for x in row]),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 6),
)
def test_union_of_unrelated_tokens_is_the_mean_over_every_choice(rows: list[list[float]], num_tokens: int) -> None:
    product = torch.tensor(rows)
    statistics = ActivationStatistics.empty(1, 1, 4)
    positions = torch.zeros(len(rows), dtype=torch.int64)
    statistics.add(0, 0, product, product, product, positions)
    statistics.num_tokens.add_(len(rows))
    unions = [
        float((product[list(chosen)] != 0).any(0).double().mean())
        for chosen in combinations(range(len(rows)), num_tokens)
    ]
    union = statistics.union_of_unrelated_tokens(num_tokens)
    if unions:
        assert union == pytest.approx(sum(unions) / len(unions), abs=1e-9)
    else:
        assert union != union


def test_coactivation_gap() -> None:
    torch.manual_seed(0)
    num_tokens, rate = 20_000, 0.25
    leaders = torch.rand(num_tokens, 4) < rate
    strangers = torch.rand(num_tokens, 8) < rate
    for fired, gap in ((torch.cat([leaders, leaders], 1), 0.75 * 6 / 7), (strangers, 0.0)):
        counts = ConsecutiveStatistics.empty(1, 1, 8)
        counts.together[0, 0] = fired.T.double().matmul(fired.double()).long()
        counts.routed[:] = num_tokens
        measured, independent = counts.coactivation_gap()
        assert measured == pytest.approx(gap, abs=0.03)
        assert independent == pytest.approx(0.0, abs=0.03)
