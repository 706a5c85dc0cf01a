"""The kernels compute the dense block, whatever they skip."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparsify.models.quantised import BlockFormat, rounded_states
from sparsify.runtime import FfnWeights, sparse_ffn
from tests.runtime.blocks import (
    ALL,
    DRELU,
    DTYPES,
    FORMATS,
    TOLERANCES,
    WORDS,
    block,
    clear_of_ties,
    difference,
    gates_of,
    in_format,
    masked_clear_of_ties,
    predictor,
    products_of,
    random_mask,
    scores_of,
    sizes_by,
    spoil,
    ups_of,
    with_copies,
    with_thresholds,
)

backends = pytest.mark.parametrize("backend", ["native", "torch"])
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Every test here may ask for the compiled kernel."""


@backends
@settings(max_examples=250, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 10), st.integers(1, 75), st.integers(1, 150)),
    name=st.sampled_from(sorted(ALL)),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    on=st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]),
    thresholded=st.sampled_from(["none", "zero", "between", "huge"]),
    site=st.sampled_from(["inter", "gate"]),
    rank=st.sampled_from([None, 1, 7, 20, "copies"]),
    threads=st.integers(1, 3),
    dense=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_block_equals_float64(
    backend, shape, name, dtype, format, on, thresholded, site, rank, threads, dense, seed
) -> None:
    # torch rounds gates to half precision before they are compared with a threshold, where fatrelu jumps.
    assume(backend == "native" or name != "fatrelu" or dtype == torch.float32)
    # Far below 0 torch's GELU is exactly 0, and what it gives underflows fp16.
    assume(name != "geglu" or on == 1.0 or (backend == "native" and dtype != torch.float16))
    x, weights = block(*shape, dtype, on=on, seed=seed)
    if rank == "copies":
        assume(backend == "native" or dtype == torch.float32)  # torch computes copies' products in half precision
        weights = with_copies(x, weights, ALL[name])
    elif rank is not None and not dense:
        chosen = predictor(weights, rank).like(x, in_blocks=format is not None)
        weights = dataclasses.replace(weights, predictor=clear_of_ties(x, chosen))
    read, weights = in_format(weights, format)
    states = x if format is None else rounded_states(x)
    read, weights = with_thresholds(read, weights, site, thresholded, states, name)
    out, rows = sparse_ffn(x, read, ALL[name], backend=backend, threads=threads, dense=dense)
    assert out.shape == x.shape
    assert out.dtype == dtype
    assert difference(out, x, weights, ALL[name], states) < TOLERANCES[dtype] + (0.0 if format is None else WORDS)
    if dense:
        chunks = math.ceil(shape[0] / 8)
        assert rows.gate == rows.up == rows.down == shape[2] * chunks
    else:
        assert rows.down <= rows.up <= rows.gate


@backends
@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 10), st.integers(1, 75), st.integers(1, 90)),
    name=st.sampled_from(["swiglu", "drelu", "relu2"]),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    sites=st.sets(st.sampled_from(["gate", "up", "inter"]), min_size=1),
    rules=st.tuples(*[st.sampled_from(["threshold", "top_k", "top_p"])] * 3),
    weighted=st.booleans(),
    rank=st.sampled_from([None, 7]),
    threads=st.integers(1, 3),
    dense=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_masks_by_every_rule_equal_float64(
    backend, shape, name, dtype, format, sites, rules, weighted, rank, threads, dense, seed
) -> None:
    assume(backend == "native" or dtype == torch.float32)  # torch rounds what a mask compares
    x, weights = block(*shape, dtype, on=0.6, seed=seed)
    if rank is not None and not dense:
        chosen = predictor(weights, rank).like(x, in_blocks=format is not None)
        weights = dataclasses.replace(weights, predictor=clear_of_ties(x, chosen))
    read, plain = in_format(weights, format)
    masks = {
        site: random_mask(rule, shape[2], weighted, seed)
        for site, rule in zip(("gate", "up", "inter"), rules, strict=True)
        if site in sites and not (rule == "threshold" and site != "up")
    }
    states = x if format is None else rounded_states(x)
    wanted = torch.ones(shape[0], shape[2], dtype=torch.bool)
    if weights.predictor is not None:
        wanted = scores_of(x.double(), weights.predictor) > weights.predictor.threshold
    gate, up = gates_of(states, plain, ALL[name]) * wanted, ups_of(states, plain, ALL[name]) * wanted
    gate, up = masked_clear_of_ties(masks.get("gate"), gate), masked_clear_of_ties(masks.get("up"), up)
    product = masked_clear_of_ties(masks.get("inter"), gate * up)
    read = dataclasses.replace(read, masks=masks)
    out, rows = sparse_ffn(x, read, ALL[name], backend=backend, threads=threads, dense=dense)
    sizes = product.abs() @ plain.down_t.double().abs()
    wrong = (out.double() - product @ plain.down_t.double()).abs().max()
    assert wrong < (TOLERANCES[dtype] + (0.0 if format is None else WORDS)) * sizes.max().clamp_min(1e-30)
    if backend == "torch" or dense or shape[0] > 8:
        return
    first, second = ("up", "gate") if "up" in masks and "gate" not in masks else ("gate", "up")
    offered = int(wanted.any(0).sum()) if rank else shape[2]
    assert getattr(rows, first) == offered
    needed = {"gate": gate, "up": up}[first].ne(0).any(0).sum()
    compares = second in masks and masks[second].rule.rule != "threshold"
    assert getattr(rows, second) == (offered if compares else needed)
    assert rows.down == product.ne(0).any(0).sum()


@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("hidden", [32, 64, 96, 160, 1024])
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
def test_the_largest_products_of_blocks_overflow_nothing(format: BlockFormat, hidden: int, tokens: int) -> None:
    """All states are 127 steps of their blocks, and all weights -8 or 7, or 127 or -127, steps of theirs."""
    low, high = (-8.0, 7.0) if format == "int4" else (-127.0, 127.0)
    signs = torch.randint(2, (hidden,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    x = torch.where(torch.arange(tokens)[:, None] % 2 == 1, -127.0 * signs, 127.0 * signs)
    along, against = torch.where(signs > 0, high, low), torch.where(signs > 0, low, high)
    gate = torch.stack([along, against]).repeat_interleave(8, 0)
    up = torch.stack([along, against, torch.full_like(signs, low), torch.full_like(signs, high)]).repeat(4, 1)
    down_t = torch.randn(16, hidden, generator=torch.Generator().manual_seed(1))
    read, weights = in_format(FfnWeights(gate, up, down_t), format)
    assert torch.equal(rounded_states(x), x)
    out, rows = sparse_ffn(x, read, ALL["reglu"], backend="native")
    assert difference(out, x, weights, ALL["reglu"]) < TOLERANCES[torch.float32]
    assert rows.down >= 8


@backends
def test_only_rows_that_count_are_read(backend: str) -> None:
    x, weights = block(1, 64, 200, on=0.1)
    gate, up = x @ weights.gate.T, x @ weights.up.T
    _, rows = sparse_ffn(x, weights, DRELU, backend=backend)
    assert rows.gate == 200
    assert rows.up == (gate > 0).sum()
    assert rows.down == ((gate > 0) & (up > 0)).sum()
    chosen = dataclasses.replace(predictor(weights, 8), threshold=2.0)
    predicting = dataclasses.replace(weights, predictor=chosen)
    on = scores_of(x, chosen) > chosen.threshold  # few enough to be gathered by torch's operators, too
    _, rows = sparse_ffn(x, predicting, DRELU, backend=backend)
    assert rows.gate == on.sum()
    assert rows.up == ((gate > 0) & on).sum()


@backends
@formats
def test_rows_that_do_not_count_are_never_touched(backend: str, format: BlockFormat | None) -> None:
    """What is not a number in a skipped row would show."""
    x, weights = block(1, 40, 100, on=0.1)
    weights, plain = in_format(weights, format)
    expected, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    gate, up = x @ plain.gate.T, x @ plain.up.T
    spoil(weights.up, (gate <= 0)[0])
    spoil(weights.down_t, ((gate <= 0) | (up <= 0))[0])
    given, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    assert torch.equal(given, expected)


@backends
@pytest.mark.parametrize("format", [None, "int8"])
def test_of_neurons_that_copies_drop_nothing_exact_is_read(backend: str, format: BlockFormat | None) -> None:
    x, weights = block(1, 40, 300, on=0.5)
    weights = with_copies(x, weights, ALL["swiglu"])
    assert weights.copies is not None
    # So few that torch's operators gather their rows.
    sizes = sizes_by(weights.copies, x, ALL["swiglu"])
    chosen = dataclasses.replace(weights.copies, threshold=sizes.flatten().sort().values[269:271].mean().item())
    weights, _ = in_format(dataclasses.replace(weights, copies=chosen), format)
    dropped = (sizes <= chosen.threshold)[0]
    for matrix in (weights.gate, weights.up, weights.down_t):
        spoil(matrix, dropped)
    out, rows = sparse_ffn(x, weights, ALL["swiglu"], backend=backend)
    assert out.isfinite().all()
    assert rows.gate == rows.up == rows.down == 30
    row, copied = weights.row_bytes, 300 * 2 * (2 * 32 * 4.5 / 8)  # two blocks a row
    read, factors = weights.read_bytes, 0 if format is None else 64 * 4
    assert read.weights(rows) + rows.offered * read.others == pytest.approx(90 * row + copied + factors)


@backends
@formats
@pytest.mark.parametrize("with_predictor", [False, True])
def test_nan_and_inf_come_out_of_the_token_that_brought_them(
    backend: str, format: BlockFormat | None, with_predictor: bool
) -> None:
    x, weights = block(3, 40, 100, on=0.3)
    if with_predictor:
        weights = dataclasses.replace(weights, predictor=predictor(weights, 8))
    weights, _ = in_format(weights, format)
    clean, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    # Rows in blocks are rounded together, and which these are depends on the neurons of all tokens.
    close = {"rtol": 0.0, "atol": 1e-6 if format is None else 1e-4}
    x[1, 5] = torch.nan
    out, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], **close)
    x[1, 5] = torch.inf
    out, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    assert not out[1].isfinite().any()
    torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], **close)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
@formats
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, tokens: int, format: BlockFormat | None) -> None:
    x, weights = block(tokens, 200, 700, dtype, on=0.3)
    predicted = dataclasses.replace(weights, predictor=predictor(weights, 24))
    for chosen in (predicted, with_copies(x, weights, DRELU)):
        read, _ = in_format(chosen, format)
        one, _ = sparse_ffn(x, read, DRELU, backend="native", threads=1)
        for threads in (2, 3, 5, 32):
            more, _ = sparse_ffn(x, read, DRELU, backend="native", threads=threads)
            assert torch.equal(one, more)


@backends
def test_strides_do_not_matter(backend: str) -> None:
    x, weights = block(4, 33, 70, on=0.4)
    expected, _ = sparse_ffn(x, weights, DRELU, backend=backend)
    wide = torch.full((4, 2, 100), torch.nan)
    wide[:, 1, 7:40] = x
    apart = torch.full((70, 90), torch.nan)
    apart[:, 11:44] = weights.gate
    scattered = FfnWeights(apart[:, 11:44], weights.up.T.contiguous().T, weights.down_t.repeat_interleave(2, 0)[::2])
    given, _ = sparse_ffn(wide[:, 1, 7:40], scattered, DRELU, backend=backend)
    assert torch.equal(given, expected)
    columns, _ = sparse_ffn(x.T.contiguous().T, scattered, DRELU, backend=backend)
    torch.testing.assert_close(columns, expected)  # torch may sum in another order


@backends
def test_a_predictor_may_look_at_something_else(backend: str) -> None:
    x, weights = block(9, 40, 100, on=0.3)
    other = block(9, 40, 100, seed=7)[0]
    chosen = clear_of_ties(other, predictor(weights, 8))
    given, _ = sparse_ffn(
        x,
        dataclasses.replace(weights, predictor=chosen),
        DRELU,
        predictor_input=other,
        backend=backend,
    )
    product = products_of(x, weights, DRELU)
    product[scores_of(other.double(), chosen) <= chosen.threshold] = 0.0
    expected = product @ weights.down_t.double()
    torch.testing.assert_close(given.double(), expected, rtol=1e-5, atol=1e-5)


@backends
def test_no_tokens_give_no_answers(backend: str) -> None:
    x, weights = block(1, 32, 64)
    out, rows = sparse_ffn(x[:0].view(2, 0, 32), weights, DRELU, backend=backend)
    assert out.shape == (2, 0, 32)
    assert rows.total == 0


def test_float64_is_left_to_torch() -> None:
    x, weights = block(2, 32, 64, torch.float64)
    out, _ = sparse_ffn(x, weights, DRELU)
    assert difference(out, x, weights, DRELU) < TOLERANCES[torch.float64]
    with pytest.raises(ValueError, match=r"cannot be used for torch\.float64 on cpu"):
        sparse_ffn(x, weights, DRELU, backend="native")


@pytest.mark.parametrize("part", ["up", "down_t", "thresholds"])
def test_what_does_not_fit_is_refused(part: str) -> None:
    x, weights = block(1, 32, 64)
    wrong = dataclasses.replace(weights, **{part: torch.zeros(63)[:, None]})
    with pytest.raises(ValueError, match=f"{part} is .*it must be"):
        sparse_ffn(x, wrong, DRELU)
    with pytest.raises(ValueError, match="must be alike"):
        sparse_ffn(x.bfloat16(), weights, DRELU)
    if part != "thresholds":
        given = {part: in_format(weights, "int8")[0].gate}
        for all_of in (weights, in_format(weights, "int4")[0]):
            with pytest.raises(ValueError, match=r"int8 blocks on cpu.*must be alike"):
                sparse_ffn(x, dataclasses.replace(all_of, **given), DRELU)
