"""Columns of inputs that a mask dropped are not read, and what is computed is the masked dense product."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparsify.models.masking import INPUT_SITES, SITES, site_rules
from sparsify.models.quantised import BlockFormat, rounded_states
from sparsify.runtime import BlockMatrix, FfnWeights, accelerate, quantise, sparse_ffn
from sparsify.runtime.accelerate import model_bytes
from tests.runtime.blocks import (
    ALL,
    DTYPES,
    EXTRAS,
    FORMATS,
    TOLERANCES,
    block,
    decoded_logits,
    difference,
    may_have,
    predictor,
)
from tests.runtime.test_step import decoded, made

HELD = [frozenset(one) for one in (["gate"], ["up"], ["gate", "up"])]
backends = pytest.mark.parametrize("backend", ["native", "torch"])
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Every test here may ask for the compiled kernels."""


def masked_block(
    shape: tuple[int, int, int], dtype: torch.dtype, kept: float, seed: int = 0, on: float = 0.6
) -> tuple[torch.Tensor, FfnWeights]:
    """As `block`, with a share of the elements of x kept for each token."""
    x, weights = block(*shape, dtype, on=on, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    return torch.where(torch.rand(x.shape, generator=generator) < kept, x, 0.0), weights


def by_columns(
    weights: FfnWeights, held: frozenset[str], format: BlockFormat | None = None
) -> tuple[FfnWeights, FfnWeights]:
    """The weights with some projections held by columns, and, by rows in fp32, what they stand for."""
    read, plain = {}, {}
    for name in ("gate", "up", "down_t"):
        part = getattr(weights, name)
        part = part.T.contiguous() if name in held else part
        read[name] = part if format is None else quantise(part, format, by_columns=name == "down_t" or name in held)
        plain[name] = part if format is None else read[name].dequantised()
        plain[name] = plain[name].T if name in held else plain[name]
    return dataclasses.replace(weights, by_columns=held, **read), dataclasses.replace(weights, **plain)


@backends
@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 10), st.integers(1, 150), st.integers(1, 150)),
    name=st.sampled_from(sorted(ALL.keys() - {"fatrelu"})),
    dtype=st.sampled_from(DTYPES),
    format=st.sampled_from(FORMATS),
    held=st.sampled_from(HELD),
    kept=st.sampled_from([0.0, 0.01, 0.3, 0.5, 1.0]),
    on=st.sampled_from([0.0, 0.1, 0.6, 1.0]),
    threads=st.integers(1, 4),
    dense=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_every_block_equals_float64(backend, shape, name, dtype, format, held, kept, on, threads, dense, seed) -> None:
    # Far below 0 torch's GELU is exactly 0, and what it gives underflows fp16.
    assume(name != "geglu" or on == 1.0 or (backend == "native" and dtype != torch.float16))
    x, weights = masked_block(shape, dtype, kept, seed, on)
    read, plain = by_columns(weights, held, format)
    out, rows = sparse_ffn(x, read, ALL[name], backend=backend, threads=threads, dense=dense)
    assert out.dtype == dtype
    # Columns in blocks are added up in steps of a 32767th of the largest of 16.
    tolerance = max(TOLERANCES[dtype], 2e-5 if format is None else 5e-4)
    rounded = x if format is None else rounded_states(x)
    states = {one: x if one in held else rounded for one in ("gate", "up")}
    gate, up = (states[one].double() @ getattr(plain, one).double().T for one in ("gate", "up"))
    # Where both read the same, `difference` knows the products; otherwise up is folded into a block that reads gate's input.
    if states["gate"] is states["up"]:
        assert difference(out, x, plain, ALL[name], states["gate"]) < tolerance
    else:
        eye = torch.eye(weights.neurons, dtype=torch.float64)
        both = torch.cat([gate, up], 1)
        zero = torch.zeros_like(eye)
        folded = FfnWeights(torch.cat([eye, zero], 1), torch.cat([zero, eye], 1), plain.down_t.double())
        assert difference(out, both, folded, ALL[name]) < tolerance
    assert (rows.gate == 0) == ("gate" in held)
    assert rows.up == 0 or "up" not in held


@backends
@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_columns_are_counted_once_for_all_tokens(backend: str, held: frozenset[str], tokens: int) -> None:
    x, weights = masked_block((tokens, 200, 70), torch.float32, 0.02)
    read, _ = by_columns(weights, held)
    _, rows = sparse_ffn(x, read, ALL["swiglu"], backend=backend)
    needed = int((x != 0).any(0).sum())
    assert 0 < needed < 100
    assert rows.gate_columns == (needed if "gate" in held else 0)
    assert rows.up_columns == (needed if "up" in held else 0)
    assert rows.columns == needed * len(held)
    sizes = read.read_bytes
    assert sizes.weights(rows) == 4 * (rows.columns * 70 + rows.total * 200)
    assert sizes.dense == 3 * 200 * 4


@formats
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_number_of_threads_changes_no_bit(tokens: int, dtype: torch.dtype, format: BlockFormat | None) -> None:
    x, weights = masked_block((tokens, 300, 700), dtype, 0.5)
    read, _ = by_columns(weights, HELD[2], format)
    one, _ = sparse_ffn(x, read, ALL["swiglu"], backend="native", threads=1)
    for threads in (2, 3, 7, 40):
        more, _ = sparse_ffn(x, read, ALL["swiglu"], backend="native", threads=threads)
        assert torch.equal(one, more)


@backends
@formats
def test_columns_that_no_token_needs_are_never_touched(backend: str, format: BlockFormat | None) -> None:
    """What is not a number in a skipped column would show."""
    x, weights = masked_block((2, 96, 130), torch.float32, 0.05)
    read, _ = by_columns(weights, HELD[2], format)
    expected, _ = sparse_ffn(x, read, ALL["swiglu"], backend=backend)
    skipped = (x == 0).all(0)
    for part in (read.gate, read.up):
        if isinstance(part, BlockMatrix):
            part.data[skipped] = 0xFF  # a scale of 0xFFFF is a NaN
        else:
            part[skipped] = torch.nan
    given, _ = sparse_ffn(x, read, ALL["swiglu"], backend=backend)
    assert torch.equal(given, expected)


@backends
@formats
def test_nan_and_inf_come_out_of_the_token_that_brought_them(backend: str, format: BlockFormat | None) -> None:
    x, weights = masked_block((3, 64, 100), torch.float32, 0.3)
    read, _ = by_columns(weights, HELD[2], format)
    clean, _ = sparse_ffn(x, read, ALL["swiglu"], backend=backend)
    for strange in (torch.nan, torch.inf):
        x[1, 5] = strange
        out, _ = sparse_ffn(x, read, ALL["swiglu"], backend=backend)
        assert not out[1].isfinite().any()
        # Columns in blocks are rounded together, and which these are depends on the inputs of all tokens.
        torch.testing.assert_close(out[[0, 2]], clean[[0, 2]], rtol=0.0, atol=1e-6 if format is None else 3e-4)


def test_a_predictor_may_be_used_with_columns() -> None:
    x, weights = masked_block((3, 64, 100), torch.float32, 0.3)
    weights = dataclasses.replace(weights, predictor=predictor(weights, 8))
    expected, _ = sparse_ffn(x, weights, ALL["reglu"])
    for held in HELD:
        given, _ = sparse_ffn(x, by_columns(weights, held)[0], ALL["reglu"])
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


THRESHOLD = {"rule": "threshold", "per": "layer"}
TEAL = {
    "sparsification": {
        "method": "percentile",
        "sites": dict.fromkeys(("attn_in", "attn_out", "ffn_in", "inter"), THRESHOLD),
    }
}
BITS = {"int8": 8.5, "int4": 4.5}
kinds = pytest.mark.parametrize("experts", [0, 3])


def masked_model(experts: int, share: float = 0.5, **fields: Any) -> Any:
    """A model whose inputs are masked to about half; thresholds that no rounding can cross."""
    model = made(
        experts=experts, **{"ffn_activation": "swiglu", "hidden_size": 64, "intermediate_size": 96} | TEAL | fields
    )
    for name, buffer in model.named_buffers():
        if name.endswith("input_mask.threshold"):
            buffer.fill_(share)
    return model


@torch.no_grad()
def rounded(model: Any, format: BlockFormat) -> Any:
    """The model with weights that are what its blocks stand for: blocks of columns where the input is masked."""
    model = copy.deepcopy(model)
    sites = site_rules(model.config)

    def of(weight: torch.Tensor, by_columns: bool, format: BlockFormat = format) -> torch.Tensor:
        lines = weight.T if by_columns else weight
        read = quantise(lines, format, by_columns=by_columns).dequantised(dtype=weight.dtype)
        return read.T if by_columns else read

    def round_states(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded_states(arguments[0]).to(arguments[0]), *arguments[1:])

    def linear(module: nn.Linear, by_columns: bool, format: BlockFormat = format) -> None:
        module.weight.copy_(of(module.weight, by_columns, format))
        if not by_columns:
            module.register_forward_pre_hook(round_states)

    for layer, ffn in zip(model.model.layers, model.ffn_blocks(), strict=True):
        for name in "qkvo":
            site = "attn_out" if name == "o" else "attn_in"
            linear(getattr(layer.self_attn, f"{name}_proj"), site in sites)
        assert "ffn_in" in sites
        if hasattr(ffn, "gate_up_proj"):
            for gate_up, down in zip(ffn.gate_up_proj, ffn.down_proj, strict=True):
                for half in gate_up.chunk(2):
                    half.copy_(of(half, True))
                down.copy_(of(down, True))
        else:
            linear(ffn.gate_proj, True)
            linear(ffn.up_proj, True)
            ffn.down_proj.weight.copy_(of(ffn.down_proj.weight, True))
    linear(model.lm_head, False, "int8")
    return model


@kinds
@formats
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_skips_columns_of_all_projections(experts: int, format: BlockFormat | None, batch: int) -> None:
    model = masked_model(experts)
    reference = model if format is None else rounded(model, format)
    ids = torch.arange(3, 3 + 6 * batch).view(batch, 6)
    expected = decoded_logits(reference, ids)
    acceleration = accelerate(model, weights=format or "stored")
    given = decoded_logits(model, ids)
    assert model.forward.steps == 6
    wrong = (given - expected).abs().flatten(0, -2).amax(-1) / expected.abs().max()
    # In blocks up to the first state that lies between two steps, or at a threshold, and goes to the other side by the last bits of
    # a sum.
    assert (wrong < 3e-4).float().mean() >= (1.0 if format is None else 0.5)
    bits = 32 if format is None else BITS[format]
    for reads in acceleration.reads:
        assert reads.rows.gate == reads.rows.up == 0
        assert 0 < reads.rows.gate_columns == reads.rows.up_columns
        read = (reads.rows.columns * 96 + reads.rows.down * 64) * bits / 8
        factors = 0 if format is None else 4 * (96 + 96 + 64)  # of the outputs
        assert reads.bytes_read == read + reads.offered / 96 * factors
        assert reads.touched_share == read / (3 * 64 * reads.offered * bits / 8)
        assert reads.touched_share < (0.8 if batch == 1 else 1.0)
        assert reads.attention.steps == 6
        factors = 0 if format is None else 4 * (64 + 64 + 32 + 32)
        assert reads.attention.bytes_offered == 6 * ((2 * 64 * 64 + 2 * 64 * 32) * bits / 8 + factors)
        assert 0 < reads.attention.bytes_read < reads.attention.bytes_offered
    skipped = sum(one.attention.bytes_offered - one.attention.bytes_read for one in acceleration.reads) / 6
    decoding = acceleration.other_bytes
    acceleration.reset()
    assert decoding == acceleration.other_bytes - round(skipped)


@kinds
def test_weights_keep_names_shapes_and_values(experts: int) -> None:
    model = masked_model(experts)
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    expected = decoded(model, 1, 3)
    accelerate(model)
    decoded(model, 1, 2)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, (value, _) in before.items())
    moved = {name.split(".")[-2] for name, (_, stride) in before.items() if after[name].stride() != stride}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert moved == attention | ({"experts"} if experts else {"gate_proj", "up_proj", "down_proj"})
    twin = copy.deepcopy(model).double().float()
    torch.testing.assert_close(decoded(twin, 1, 3), expected, rtol=1e-4, atol=1e-4)
    # The baseline of speed-ups reads rows, so their order comes back.
    dense = accelerate(model, dense=True)
    torch.testing.assert_close(decoded(model, 1, 3), expected, rtol=1e-4, atol=1e-4)
    assert model.model.layers[0].self_attn.q_proj.weight.is_contiguous()
    assert all(reads.rows.gate == reads.offered for reads in dense.reads)


def test_without_a_mask_on_inputs_nothing_changes() -> None:
    model = made()
    accelerate(model)
    decoded(model, 1, 1)
    kept = [parameter for name, parameter in model.named_parameters() if "down_proj" not in name]
    assert all(parameter.is_contiguous() for parameter in kept)


@pytest.mark.parametrize(
    ("fields", "columns"),
    [
        ({"ffn_activation": "swiglu"}, {"gate", "up"}),
        ({"ffn_activation": "drelu"}, {"gate"}),  # fewer rows of up than columns
    ],
)
def test_up_is_read_by_rows_where_the_gate_makes_zeros(fields: dict[str, Any], columns: set[str]) -> None:
    model = masked_model(0, **fields)
    expected = decoded(model, 1, 3)
    acceleration = accelerate(model)
    torch.testing.assert_close(decoded(model, 1, 3), expected, rtol=1e-4, atol=1e-4)
    rows = acceleration.reads[0].rows
    assert {name for name in ("gate", "up") if getattr(rows, f"{name}_columns")} == columns


@kinds
@pytest.mark.parametrize("share", [0.0, 1e9])
def test_inputs_that_are_kept_or_dropped_altogether(experts: int, share: float) -> None:
    model = masked_model(experts, share)
    expected = decoded(model, 2, 3)
    acceleration = accelerate(model)
    torch.testing.assert_close(decoded(model, 2, 3), expected, rtol=1e-4, atol=1e-4)
    for reads in acceleration.reads:
        if share:
            assert reads.bytes_read == reads.attention.bytes_read == 0
        else:
            assert reads.attention.bytes_read == reads.attention.bytes_offered


@formats
def test_any_number_of_threads_gives_the_same_bits(format: BlockFormat | None) -> None:
    for experts in (0, 4):
        model = masked_model(experts, hidden_size=256, intermediate_size=704, dtype=torch.bfloat16)
        outputs = []
        for threads in (1, 2, 3):
            accelerate(model, weights=format or "stored", threads=threads)
            outputs.append(decoded(model, 3, 4))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])


def test_a_prompt_and_blocks_alone_compute_the_same_model() -> None:
    for experts in (0, 3):
        model = masked_model(experts)
        reference = rounded(model, "int4")
        accelerate(model, weights="int4", keep_weights=False)
        ids = torch.arange(3, 43)[None]
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-4)


RULES = ("threshold", "top_k", "top_p")
ATTENTION = tuple(site for site in INPUT_SITES if site.startswith("attn"))
CASES = [
    (site, rule, extra)
    for site in SITES
    for rule in RULES
    for extra in EXTRAS
    if may_have(site, extra) and (rule == "top_k" or extra not in ("low_rank", "rotated"))
]


@kinds
@pytest.mark.parametrize(("site", "rule", "extra"), CASES)
def test_every_site_and_rule_in_a_step_and_in_a_block(experts: int, site: str, rule: str, extra: str) -> None:
    fields = {"rule": rule, "per": "layer", "weighted": rule != "threshold"} | EXTRAS[extra]
    stored = {"method": "percentile", "sites": {site: fields}}
    model = made(1, experts=experts, ffn_activation="swiglu", sparsification=stored)
    expected = decoded(model, 2, 3)
    acceleration = accelerate(model)
    given = decoded(model, 2, 3)
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
    assert model.forward.steps == 3
    reads, layer = acceleration.reads[0], model.model.layers[0]
    others = 4 * sum(
        buffer.numel() // (experts if buffer.dim() > 2 else 1)
        for name, buffer in layer.named_buffers()
        if name.rpartition(".")[2] in ("basis", "remainder_left", "remainder_right")
    )
    assert (others > 0) == (extra in ("low_rank", "rotated"))
    in_attention = site in ATTENTION
    if rule == "top_k":
        columns_read = reads.attention.bytes_read - (3 * others if in_attention else 0)
        assert (columns_read < reads.attention.bytes_offered) == in_attention
    if others and in_attention:
        assert acceleration.other_bytes == model_bytes(model).other + round(
            sum(one.attention.bytes_read - one.attention.bytes_offered for one in acceleration.reads) / 3
        )
    # Low-rank factors are of every expert that a token is routed to, a rotation is of the layer.
    times = reads.offered // 72 if experts and extra == "low_rank" else 3
    rows, columns = reads.rows.total * 48 * 4, reads.rows.columns * 72 * 4
    assert reads.bytes_read == rows + columns + (0 if in_attention else times * others)
    assert (reads.rows.columns > 0) == (site in INPUT_SITES and not in_attention)
    if site == "up":
        assert reads.rows.gate < reads.rows.up == reads.offered
        assert reads.rows.down <= reads.rows.gate
    elif site == "gate":
        assert reads.rows.down <= reads.rows.up < reads.rows.gate == reads.offered
    elif site == "inter":
        assert reads.rows.down < reads.rows.up == reads.rows.gate == reads.offered
    model.model.norm.register_forward_hook(lambda *_: None)  # a hook makes every call go through torch
    given = decoded(model, 2, 3)
    torch.testing.assert_close(given, expected, rtol=2e-4, atol=2e-4 * expected.abs().max().item())
    assert model.forward.steps == 3


@pytest.mark.parametrize("rule", ["top_k", "top_p"])
@pytest.mark.parametrize("site", ["attn_in", "ffn_in.up"])
def test_what_is_not_a_number_is_kept(site: str, rule: str) -> None:
    model = made(sparsification={"method": "percentile", "sites": {site: {"rule": rule}}})
    accelerate(model)
    with torch.no_grad():
        model.model.embed_tokens.weight[5, 4] = torch.nan
    assert decoded_logits(model, torch.tensor([[5]])).isnan().all()
    assert model.forward.steps == 1


@kinds
@pytest.mark.parametrize("format", ["int8", "int4"])
@pytest.mark.parametrize("site", ["ffn_in", "ffn_in.up", "attn_in", "attn_in.v"])
def test_blocks_alone_keep_rotations_and_low_rank_factors(experts: int, format: BlockFormat, site: str) -> None:
    """Prompts are computed from the blocks by torch, steps in C++."""
    extra = "low_rank" if "." in site else "rotated"
    stored = {"method": "percentile", "sites": {site: {"rule": "top_k"} | EXTRAS[extra], "up": {"rule": "top_p"}}}
    model = made(1, experts=experts, ffn_activation="swiglu", sparsification=stored)
    accelerate(model, weights=format, keep_weights=False)
    ids = torch.arange(3, 35).view(16, 2)
    with torch.no_grad():
        whole = model(ids).logits
    steps = torch.cat([decoded_logits(model, few) for few in ids.split([1, 2, 5, 8])])
    assert model.forward.steps == 8
    wrong = (steps - whole).abs().amax(-1) / whole.abs().max()
    # But for sequences with a state that lies between two steps, and is rounded to the other one.
    assert (wrong < 1e-4).float().mean() > 0.4
    assert wrong.max() < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_half_precision_with_rotations_and_low_rank_factors(experts: int, dtype: torch.dtype) -> None:
    """They are in the model's dtype, too: nearer to fp32 than torch is."""
    sites = {"attn_in": EXTRAS["rotated"], "attn_out": EXTRAS["low_rank"], "ffn_in.gate": EXTRAS["low_rank"]}
    sites |= {"ffn_in.up": EXTRAS["rotated"]}
    model = made(1, experts=experts, dtype=dtype, sparsification={"method": "percentile", "sites": sites})
    for name, buffer in model.named_buffers():
        if name.endswith("threshold"):
            buffer.fill_(1e-3)  # nearly all is kept, so that rounding decides little of it
    own = decoded(model, 3, 8)
    accelerate(model)
    native = decoded(model, 3, 8)
    assert model.forward.steps == 8
    exact = decoded(copy.deepcopy(model).float(), 3, 8)
    assert (native - exact).square().mean() <= 1.2 * (own - exact).square().mean()


def test_a_rotated_or_low_rank_model_is_the_same_bits_for_any_number_of_threads() -> None:
    for experts in (0, 4):
        sites = {"attn_in": EXTRAS["rotated"], "attn_out": EXTRAS["low_rank"], "ffn_in.gate": EXTRAS["low_rank"]}
        sites |= {"ffn_in.up": EXTRAS["rotated"], "up": {"rule": "top_k"}, "inter": {"rule": "top_p"}}
        stored = {"method": "percentile", "sites": sites}
        model = made(experts=experts, hidden_size=96, ffn_activation="swiglu", sparsification=stored)
        outputs = []
        for threads in (1, 2, 3):
            accelerate(model, threads=threads)
            outputs.append(decoded(model, 3, 4))
        assert torch.equal(outputs[0], outputs[1])
        assert torch.equal(outputs[0], outputs[2])
