"""What the Triton kernels must do: on the GPU where there is one, else in Triton's interpreter.

`test_triton_ffn.py` runs it in a process of its own, since Triton must be told to interpret before it is imported.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from sparsify.bench.decode_models import capture_steps
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.models.masking import NUMBERS, SiteMask, SiteRule, kept_count
from sparsify.runtime import FfnWeights, Predictor, RowsRead, accelerate, device_cache, sparse_ffn
from sparsify.runtime.device_step import DeviceStep, device_refusal
from sparsify.runtime.ffn import Routing, sparse_experts
from sparsify.runtime.triton_columns import column_product, masked_by_triton
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
from tests.runtime.test_step import close, decoded, made

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def moved(weights: FfnWeights) -> FfnWeights:
    chosen = weights.predictor
    if chosen is not None:
        chosen = dataclasses.replace(chosen, a=chosen.a.to(DEVICE), b=chosen.b.to(DEVICE))
    tensors = {name: part.to(DEVICE) for name, part in vars(weights).items() if isinstance(part, torch.Tensor)}
    return dataclasses.replace(weights, predictor=chosen, **tensors)


def computed(x: torch.Tensor, weights: FfnWeights, name: str = "drelu", **options):
    out, rows = sparse_ffn(x.to(DEVICE), moved(weights), ALL[name], backend="triton", **options)
    return out.cpu(), rows


def held_by_columns(weights: FfnWeights, held: Collection[str]) -> FfnWeights:
    read = {name: getattr(weights, name).mT.contiguous() for name in held}
    return dataclasses.replace(weights, by_columns=frozenset(held), **read)


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
    held=st.sets(st.sampled_from(["gate", "up"])),
    kept=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_every_block_equals_float64(shape, name, dtype, on, thresholded, site, rank, dense, held, kept, seed) -> None:
    x, weights = block(*shape, dtype, on=on, seed=seed)
    x = torch.where(torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < kept, x, 0.0) if held else x
    if rank is not None and not dense:
        chosen = clear_of_ties(x, predictor(weights, rank))
        weights = dataclasses.replace(weights, predictor=chosen)
    _, weights = with_thresholds(weights, weights, site, thresholded, x, name)
    read = held_by_columns(weights, held)
    out, rows = computed(x, read, name, dense=dense)
    assert out.dtype == dtype
    assert difference(out, x, weights, ALL[name]) < TOLERANCES[dtype]
    chunks = [x[start : start + 8] for start in range(0, shape[0], 8)]
    every, needed = shape[2] * len(chunks), sum(int((one != 0).any(0).sum()) for one in chunks)
    needed = shape[1] * len(chunks) if dense else needed
    assert rows.offered == every
    assert (rows.gate_columns, rows.up_columns) == tuple(needed if one in held else 0 for one in ("gate", "up"))
    assert rows.gate == 0 or "gate" not in held
    assert rows.up == 0 or "up" not in held
    if dense:
        assert counted(rows)[1:] == tuple(0 if one in held else every for one in ("gate", "up", "down"))
    elif not held:
        assert rows.down <= rows.up <= rows.gate <= rows.offered
    again, _ = computed(x, read, name, dense=dense)
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


def naively_kept(scores: list[float], rule: str, number: float) -> list[bool]:
    """Which elements `top_k` or `top_p` keeps, largest first, and of equal ones the first."""
    order = sorted(range(len(scores)), key=lambda place: -scores[place])
    total, before, kept = math.fsum(scores), 0.0, [False] * len(scores)
    for count, place in enumerate(order):
        top_k = count < kept_count(number, len(scores))
        kept[place] = top_k if rule == "top_k" else number <= 0 or before < (1 - number) * total
        before += scores[place]
    return kept


@settings(max_examples=2 * int(os.environ["TRITON_EXAMPLES"]), deadline=None)
@given(
    tokens=st.integers(1, 4),
    channels=st.sampled_from([1, 5, 64, 200]),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(["threshold", "channel", "top_k", "top_k", "top_p"]),
    number=st.sampled_from([0.0, 0.1, 0.25, 0.3, 0.7, 1.0]),
    weighted=st.booleans(),
    experts=st.sampled_from([0, 3]),
    seed=st.integers(0, 10**6),
)
def test_masks_keep_what_their_rules_say(tokens, channels, dtype, rule, number, weighted, experts, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few different sizes, so that many scores are equal, and sums of them are exact.
    x = torch.randint(-8, 9, (tokens, channels), generator=generator).to(dtype) / 4
    of_each = (experts, channels) if experts else (channels,)
    weight = torch.randint(1, 4, of_each, generator=generator).float()
    scored = rule in ("top_k", "top_p")
    kind = SiteRule("threshold" if rule == "channel" else rule, weighted=weighted and scored)
    mask = SiteMask(kind, {NUMBERS[kind.rule]: (1,), "weight": of_each})
    tensors = {"weight": weight} if kind.weighted else {}
    stored = torch.rand(of_each, generator=generator) if rule == "channel" else torch.tensor([number])
    mask.put(tensors | {NUMBERS[kind.rule]: stored})
    given = masked_by_triton(mask.to(DEVICE), x.to(DEVICE)).cpu()
    has_experts = experts and (rule == "channel" or kind.weighted)
    assert given.shape == ((experts,) if has_experts else ()) + x.shape
    for expert in range(experts or 1):
        own = given[expert] if has_experts else given
        own_weight = weight[expert] if experts else weight
        for token in range(tokens):
            scores = x[token].double().abs() * (own_weight if kind.weighted else 1)
            if scored:
                kept = torch.tensor(naively_kept(scores.tolist(), rule, torch.tensor(number).item()))
            else:
                limit = stored[expert] if rule == "channel" and experts else stored
                kept = scores > limit
            assert torch.equal(own[token], torch.where(kept, x[token], 0.0))


@pytest.mark.parametrize("rule", ["threshold", "top_k", "top_p"])
def test_masks_keep_what_is_not_a_number(rule: str) -> None:
    mask = SiteMask(SiteRule(rule), {NUMBERS[rule]: (1,)})
    mask.put({NUMBERS[rule]: torch.full((1,), 0.5)}).to(DEVICE)
    x = torch.tensor([[1.0, torch.nan, 0.25, -3.0, 0.0]], device=DEVICE)
    torch.testing.assert_close(masked_by_triton(mask, x), mask(x), equal_nan=True)


@settings(max_examples=int(os.environ["TRITON_EXAMPLES"]), deadline=None)
@given(
    tokens=st.integers(1, 8),
    inputs=st.sampled_from([1, 33, 150]),
    outputs=st.sampled_from([1, 40, 530]),
    dtype=st.sampled_from(DTYPES),
    kept=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_projections_by_columns_equal_float64(tokens, inputs, outputs, dtype, kept, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inputs, generator=generator)
    x = torch.where(torch.rand(tokens, inputs, generator=generator) < kept, x, 0.0).to(dtype)
    weight_t = torch.randn(inputs, outputs, generator=generator).to(dtype)
    expected = x.double() @ weight_t.double()
    skipped = (x == 0).all(0)
    weight_t[skipped] = torch.nan
    counts = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    given = column_product(x.to(DEVICE), weight_t.to(DEVICE), counts, 2).cpu()
    assert given.dtype == dtype
    sizes = x.double().abs() @ weight_t.nan_to_num().double().abs() + 1
    assert ((given.double() - expected).abs() / sizes).max() < TOLERANCES[dtype]
    assert counts.tolist() == [0, 0, int((~skipped).sum()), 0]


SITES = {
    "ffn_in": {"rule": "top_k", "per": "layer", "weighted": True, "remainder": "constant"},
    "inter": {"rule": "threshold", "per": "channel", "remainder": "constant"},
}
PAIR = {"ffn_in.gate": {"rule": "threshold", "per": "channel"}, "ffn_in.up": {"rule": "top_p", "remainder": "constant"}}


@pytest.mark.parametrize("sites", [SITES, PAIR], ids=["shared", "of each"])
@pytest.mark.parametrize("experts", [0, 3])
def test_masked_blocks_skip_columns(experts: int, sites: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stored = {"method": "percentile", "sites": sites}
    model = made(1, experts=experts, ffn_activation="swiglu", num_hidden_layers=1, sparsification=stored).to(DEVICE)
    given = (0.1 * torch.randn(3, 48, generator=torch.Generator().manual_seed(0)).to(DEVICE),)
    if experts:
        given += torch.tensor([[0, 2], [2, 1], [0, 2]], device=DEVICE), torch.rand(3, 2, device=DEVICE)
    block = model.ffn_blocks()[0]
    with torch.no_grad():
        expected = block(*given)
        acceleration = accelerate(model)
        # Nothing waits for the device.
        monkeypatch.setattr(torch.Tensor, "__float__", None)
        monkeypatch.setattr(torch.Tensor, "tolist", None)
        out = block(*given)
        monkeypatch.undo()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    rows = acceleration.reads[0].rows
    assert rows.gate == rows.up == 0
    assert 0 < rows.gate_columns < 48 * max(experts, 1)
    assert rows.offered == 72 * max(experts, 1)


@pytest.mark.parametrize(("kind", "with_predictors"), [("mistral", False), ("mixtral", True)])
def test_models_say_what_they_said(kind: str, with_predictors: bool, stock: dict[str, Path]) -> None:
    model = load_sparse(stock[kind], "drelu", torch.float32).to(DEVICE)
    rows = 1 if kind == "mixtral" else 2  # the interpreter takes its time for each expert
    ids = torch.arange(3, 5 if kind == "mixtral" else 6, device=DEVICE)[None].repeat(rows, 1)
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
        assert passes in (range(4, 9) if kind == "mixtral" else (3,))
        predicted = passes * predictor_bytes if with_predictors else 0
        assert reads.bytes_read == reads.rows.total * row + predicted
    torch.testing.assert_close(decoded_logits(copy.deepcopy(model), ids), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoded_logits(model.bfloat16(), ids).float(), expected, rtol=0.1, atol=0.1)


EVERY_SITE = {
    "attn_in": {"rule": "top_k", "weighted": True, "remainder": "constant"},
    "attn_out": {"rule": "threshold", "per": "channel", "remainder": "low_rank", "rank": 2},
    "ffn_in": {"rule": "top_p", "rotated": True},
}


@pytest.mark.parametrize(
    ("experts", "fields", "mask"),
    [
        (0, {}, False),
        (0, {"sliding_window": 4, "num_hidden_layers": 1}, True),
        (0, {"ffn_activation": "swiglu", "sparsification": {"method": "percentile", "sites": EVERY_SITE}}, True),
        (3, {"num_hidden_layers": 1}, False),
    ],
    ids=["plain", "sliding", "masked", "experts"],
)
def test_steps_equal_stock_transformers(
    experts: int, fields: dict[str, Any], mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(experts=experts, **fields).to(DEVICE)
    expected = decoded(model, 2, 3, mask=mask)
    acceleration = accelerate(model)
    compute = DeviceStep.compute

    def without_waiting(step: DeviceStep) -> torch.Tensor:
        for name in ("__float__", "__int__", "__index__", "__bool__", "item", "tolist"):
            monkeypatch.setattr(torch.Tensor, name, None)
        try:
            return compute(step)
        finally:
            monkeypatch.undo()

    with monkeypatch.context() as patched:
        patched.setattr(DeviceStep, "compute", without_waiting)
        given = decoded(model, 2, 3, mask=mask)
    close(model, expected, given, 3)
    assert model.forward.captured == (DEVICE == "cuda")
    for reads in acceleration.reads:
        assert reads.tokens == 6
        assert 0 < reads.touched_share < 1
        assert (0 < reads.attention.bytes_read < reads.attention.bytes_offered) == ("sparsification" in fields)


def one_layer(**fields: Any) -> Any:
    return made(num_hidden_layers=1, hidden_size=16, intermediate_size=24, num_attention_heads=2, **fields).to(DEVICE)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 3])
def test_caches_take_turns_in_the_buffer_which_grows(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_cache, "SPARE_POSITIONS", 2)
    monkeypatch.setattr(device_cache, "ALIGNED_POSITIONS", 1)
    model, plain = one_layer(sliding_window=window), one_layer(sliding_window=window)
    accelerate(model)
    ids, outputs = torch.arange(3, 23, device=DEVICE)[None], []
    for one in (plain, model):
        cache, other = (one(ids[:, :n], use_cache=True).past_key_values for n in (4, 2))
        steps = [one(ids[:, 4 + n : 5 + n], past_key_values=cache).logits for n in range(6)]
        steps += [one(ids[:, 2:3], past_key_values=other).logits, one(ids[:, 10:11], past_key_values=cache).logits]
        twin = copy.deepcopy(cache)
        steps += [one(ids[:, 11:12], past_key_values=which).logits for which in (twin, cache, other)]
        steps += [one(ids[:, 12:13].repeat(2, 1)).logits, one(ids[:, 12:13], past_key_values=cache).logits]
        outputs.append(torch.cat([logits.flatten() for logits in steps]))
        assert cache.get_seq_length() == 13
    assert model.forward.steps == 13
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_the_baseline_of_graphs_is_the_dense_model() -> None:
    model = one_layer(ffn_activation="swiglu")
    expected = decoded(model, 2, 2)
    capture_steps(model)
    close(model, expected, decoded(model, 2, 2), 2)


def test_beams_choose_the_same() -> None:
    model = one_layer()
    ids = torch.tensor([[0, 0, 5, 6], [8, 9, 10, 11]], device=DEVICE)
    options = {"max_new_tokens": 4, "pad_token_id": 0, "attention_mask": (ids > 0).long(), "num_beams": 2}
    expected = model.generate(ids, do_sample=False, **options)
    accelerate(model)
    with torch.inference_mode():
        decoded(model, 2, 1)
    assert torch.equal(model.generate(ids, do_sample=False, **options), expected)
    assert model.forward.steps == 4


def test_what_cannot_be_captured_goes_through_torch_and_is_said_once() -> None:
    model = one_layer()
    expected = decoded(model, 1, 2)
    accelerate(model)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with pytest.warns(UserWarning, match="a CUDA graph does not compute a static cache") as said:
        given = decoded(model, 1, 2, cache)
    assert len(said) == 1
    close(model, expected, given, 0)
    with torch.no_grad():
        model(torch.tensor([[5]], device=DEVICE), past_key_values=DynamicCache())  # it has no layers yet
    assert model.forward.steps == 0
    model.config._attn_implementation = "flex_attention"
    assert "attention by flex_attention" in str(device_refusal(model, []))
