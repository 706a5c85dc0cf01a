"""What the Triton kernels must do: on the GPU where there is one, else in Triton's interpreter.

`test_triton_ffn.py` runs it in a process of its own, since Triton must be told to interpret before it is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.runtime import FfnWeights, Predictor, RowsRead, accelerate, sparse_ffn
from sparsify.runtime.ffn import Routing, sparse_experts
from tests.predictors.untrained import random_predictors
from tests.runtime.blocks import (
    ALL,
    DRELU,
    DTYPES,
    TOLERANCES,
    block,
    clear_of_ties,
    decoded_logits,
    difference,
    predictor,
    scores_of,
    with_thresholds,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(weights: FfnWeights) -> FfnWeights:
    chosen = weights.predictor
    if chosen is not None:
        chosen = dataclasses.replace(chosen, a=chosen.a.to(DEVICE), b=chosen.b.to(DEVICE))
    given = (weights.gate, weights.up, weights.down_t, weights.thresholds, weights.gate_thresholds)
    gate, up, down_t, thresholds, gate_thresholds = (None if part is None else part.to(DEVICE) for part in given)
    return FfnWeights(gate, up, down_t, thresholds, chosen, gate_thresholds)


def computed(x: torch.Tensor, weights: FfnWeights, name: str = "drelu", **options):
    out, rows = sparse_ffn(x.to(DEVICE), moved(weights), ALL[name], backend="triton", **options)
    return out.cpu(), rows


def counted(rows: RowsRead) -> tuple[int, ...]:
    return rows.offered, rows.gate, rows.up, rows.down


@settings(max_examples=int(os.environ["TRITON_EXAMPLES"]), deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.sampled_from([1, 33, 130, 530]), st.sampled_from([1, 64, 129, 150])),
    name=st.sampled_from(sorted(ALL)),
    dtype=st.sampled_from(DTYPES),
    on=st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]),
    thresholded=st.sampled_from(["none", "zero", "between", "huge"]),
    site=st.sampled_from(["inter", "gate"]),
    rank=st.sampled_from([None, 1, 7, 20]),
    dense=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_block_equals_float64(shape, name, dtype, on, thresholded, site, rank, dense, seed) -> None:
    x, weights = block(*shape, dtype, on=on, seed=seed)
    if rank is not None and not dense:
        chosen = clear_of_ties(x, predictor(weights, rank))
        weights = dataclasses.replace(weights, predictor=chosen)
    _, weights = with_thresholds(weights, weights, site, thresholded, x, name)
    out, rows = computed(x, weights, name, dense=dense)
    assert out.dtype == dtype
    assert difference(out, x, weights, ALL[name]) < TOLERANCES[dtype]
    if dense:
        assert counted(rows) == (shape[2] * math.ceil(shape[0] / 8),) * 4
    else:
        assert rows.down <= rows.up <= rows.gate <= rows.offered
    again, _ = computed(x, weights, name, dense=dense)
    assert torch.equal(out, again)


@pytest.mark.parametrize("with_predictor", [False, True])
@pytest.mark.parametrize("tokens", [1, 8])
def test_rows_are_counted_as_they_are_needed(tokens: int, with_predictor: bool) -> None:
    x, weights = block(tokens, 64, 200, on=0.1)
    wanted = torch.ones(tokens, 200, dtype=torch.bool)
    if with_predictor:
        chosen = clear_of_ties(x, predictor(weights, 8))
        weights = dataclasses.replace(weights, predictor=chosen)
        wanted = scores_of(x.double(), chosen) > chosen.threshold
    gate, up = x @ weights.gate.T > 0, x @ weights.up.T > 0
    lists = wanted, wanted & gate, wanted & gate & up
    expected = [200, *(int(one.any(0).sum()) for one in lists)]
    total = RowsRead(gate=5)
    for _ in range(2):  # fetched in between or not, nothing is lost and nothing counts twice
        rows = computed(x, weights)[1]
        total += rows
        total += computed(x, weights)[1]
        assert list(counted(rows)) == expected
    assert list(counted(total)) == [4 * n + extra for n, extra in zip(expected, (0, 5, 0, 0), strict=True)]


def test_rows_that_do_not_count_are_never_touched() -> None:
    """What is not a number in a skipped row would show."""
    x, weights = block(1, 40, 200, on=0.1)
    expected, _ = computed(x, weights)
    gate, up = x @ weights.gate.T, x @ weights.up.T
    weights.up[(gate <= 0)[0]] = torch.nan
    weights.down_t[((gate <= 0) | (up <= 0))[0]] = torch.nan
    assert torch.equal(computed(x, weights)[0], expected)
    chosen = clear_of_ties(x, predictor(weights, 8))
    predicting = dataclasses.replace(weights, predictor=chosen)
    expected, _ = computed(x, predicting)
    weights.gate[(scores_of(x.double(), chosen) <= chosen.threshold)[0]] = torch.nan
    assert torch.equal(computed(x, predicting)[0], expected)


@pytest.mark.parametrize("with_predictor", [False, True])
def test_nan_and_inf_come_out_of_the_token_that_brought_them(with_predictor: bool) -> None:
    x, weights = block(3, 40, 100, on=0.3)
    if with_predictor:
        weights = dataclasses.replace(weights, predictor=predictor(weights, 8))
    clean, _ = computed(x, weights)
    for strange in (torch.nan, torch.inf):
        x[1, 5] = strange
        out, _ = computed(x, weights)
        assert not out[1].isfinite().any()
        assert math.isinf(strange) or out[1].isnan().all()
        torch.testing.assert_close(out[[0, 2]], clean[[0, 2]])


def test_strides_do_not_matter() -> None:
    x, weights = block(4, 33, 70, on=0.4)
    expected, _ = computed(x, weights)
    wide = torch.full((4, 2, 100), torch.nan, device=DEVICE)
    wide[:, 1, 7:40] = x
    apart = torch.full((70, 90), torch.nan, device=DEVICE)
    apart[:, 11:44] = weights.gate
    columns = weights.up.to(DEVICE).T.contiguous().T
    doubled = weights.down_t.to(DEVICE).repeat_interleave(2, 0)[::2]
    scattered = FfnWeights(apart[:, 11:44], columns, doubled)
    for seen in (wide[:, 1, 7:40], x.to(DEVICE).T.contiguous().T):
        out, _ = sparse_ffn(seen, scattered, DRELU, backend="triton")
        assert torch.equal(out.cpu(), expected)
    out, rows = sparse_ffn(wide[:0, :, :33], scattered, DRELU, backend="triton")
    assert out.shape == (0, 2, 33)
    assert rows.total == 0


@pytest.mark.parametrize("with_predictor", [False, True])
@pytest.mark.parametrize(("tokens", "slots"), [(1, 1), (1, 2), (5, 3), (9, 2)])
def test_experts_equal_the_sum_of_single_ones(tokens: int, slots: int, with_predictor: bool) -> None:
    x, _ = block(tokens, 40, 70)
    blocks = [block(1, 40, 70, on=0.3, seed=seed)[1] for seed in range(5)]
    fused = torch.stack([torch.cat([one.gate, one.up]) for one in blocks]).to(DEVICE)
    gate, up = fused.chunk(2, dim=1)
    down_t = torch.stack([one.down_t for one in blocks]).to(DEVICE)
    limits = torch.rand(5, 70)
    index = torch.stack([torch.randperm(4)[:slots] for _ in range(tokens)])
    shares = torch.rand(tokens, slots)
    chosen: Predictor | None = None
    blocks = [dataclasses.replace(one, thresholds=limit) for one, limit in zip(blocks, limits, strict=True)]
    if with_predictor:
        blocks = [dataclasses.replace(one, predictor=predictor(one, 6)) for one in blocks]
        a, b = (torch.stack([getattr(one.predictor, part) for one in blocks]) for part in "ab")
        chosen = Predictor(a.to(DEVICE), b.to(DEVICE), predictor(blocks[0], 6).threshold)
    for part in (gate, up, down_t):
        part[4] = torch.nan  # nobody is sent there
    weights = FfnWeights(gate, up, down_t, limits.to(DEVICE), chosen)
    routing = Routing(index.to(DEVICE), shares.to(DEVICE))
    given, rows = sparse_experts(x.to(DEVICE), weights, DRELU, routing)
    expected, read = torch.zeros(tokens, 40), RowsRead()
    for start in range(0, tokens, 8):
        own = slice(start, start + 8)
        for expert in range(4):
            token, slot = torch.where(index[own] == expert)
            if len(token):
                answer, more = sparse_ffn(x[own][token], blocks[expert], DRELU, backend="torch")
                expected[own].index_add_(0, token, answer * shares[own][token, slot, None])
                read += more
    torch.testing.assert_close(given.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert rows.offered == read.offered
    assert rows.down <= read.down  # torch's operators read all where gathering does not pay
    assert rows.gate == read.gate or with_predictor


@pytest.mark.parametrize(("kind", "with_predictors"), [("mistral", False), ("mixtral", True)])
def test_models_say_what_they_said(kind: str, with_predictors: bool, stock: dict[str, Path]) -> None:
    model = load_sparse(stock[kind], "drelu", torch.float32).to(DEVICE)
    rows = 1 if kind == "mixtral" else 2  # the interpreter takes its time for each expert
    ids = torch.arange(3, 6, device=DEVICE)[None].repeat(rows, 1)
    expected, config = decoded_logits(model, ids), model.config
    predictors = None
    if with_predictors:  # they want all
        predictors = random_predictors(model, -1e9, rank=8).for_decoding(model, "predictors")
    acceleration = accelerate(model, predictors=predictors)
    assert acceleration.backend == "triton"
    torch.testing.assert_close(decoded_logits(model, ids), expected, rtol=1e-4, atol=1e-5)
    row = config.hidden_size * 4
    predictor_bytes = 8 * (config.hidden_size + config.intermediate_size) * 4
    for reads in acceleration.reads:
        assert reads.tokens == ids.numel()
        assert 0 < reads.rows.down < reads.rows.up < reads.rows.gate == reads.offered
        passes = reads.offered // config.intermediate_size
        assert passes in (range(6, 13) if kind == "mixtral" else (3,))
        predicted = passes * predictor_bytes if with_predictors else 0
        assert reads.bytes_read == reads.rows.total * row + predicted
    torch.testing.assert_close(decoded_logits(copy.deepcopy(model), ids), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded_logits(model.bfloat16(), ids).float(), expected, rtol=0.1, atol=0.1)
