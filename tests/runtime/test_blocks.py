"""Weights in int8 and int4 blocks: what rounding costs, and that they follow the weights they were made of."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from sparsify.models.quantised import BlockFormat, rounded_states
from sparsify.runtime import accelerate, quantise
from tests.runtime.test_accelerate import decoded_logits, generate

BITS = {"int8": 8.5, "int4": 4.5}
SHARES = {"int8": 0.51 / 127, "int4": 1.04 / 8}
"""Largest error of a weight, as a share of its block's largest: half a step of int8; in int4 8 may become 7, next to a scale in bf16."""
kinds = pytest.mark.parametrize("kind", ["mistral", "mixtral"])
formats = pytest.mark.parametrize("format", list(BITS))


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Models here decode by the compiled kernel."""


@formats
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 100),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 10**6),
)
def test_no_weight_moves_by_more_than_a_step(format, rows, columns, dtype, exponent, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = 10.0**exponent if dtype != torch.float16 else 1.0
    weight = (torch.randn(rows, columns, generator=generator).double() * size).to(dtype)
    weight[:, ::7] = 0.0
    made = quantise(weight, format)
    assert made.shape == weight.shape
    assert made.data.shape[1] == -(-columns // 32) * 32 * BITS[format] / 8
    wrong = (made.dequantised(dtype=torch.float64) - weight.double()).abs()
    for start in range(0, columns, 32):
        part = slice(start, start + 32)
        largest = weight[:, part].double().abs().amax(1, keepdim=True)
        assert (wrong[:, part] <= SHARES[format] * largest).all()
    torch.testing.assert_close(made.dequantised(slice(1, None, 2)), made.dequantised()[1::2])


@formats
def test_what_is_not_finite_shows_in_its_block_alone(format: BlockFormat) -> None:
    weight = torch.randn(3, 70)
    clean = quantise(weight, format).dequantised()
    weight[0, 40], weight[1, 69], weight[2, 0] = torch.nan, torch.inf, -torch.inf
    dirty = quantise(weight, format).dequantised()
    assert dirty[0, 32:64].isnan().all()
    assert dirty[1, 64:].isnan().all()
    assert dirty[2, :32].isnan().all()
    assert torch.equal(dirty[0, :32], clean[0, :32])
    assert dirty.isnan().sum() == 32 + 6 + 32


@formats
@pytest.mark.parametrize("size", [2.0**-100, 1.0, 2.0**100])
def test_by_columns_outputs_of_other_sizes_change_no_rounding(format: BlockFormat, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 70, generator=generator)
    weight[:, 3] = 0.0
    scales = 2.0 ** torch.randint(-8, 8, (70,), generator=generator) * size
    plain = quantise(weight, format, by_columns=True).dequantised()
    assert torch.equal(quantise(weight * scales, format, by_columns=True).dequantised(), plain * scales)
    assert (plain[:, 3] == 0.0).all()
    weight[7, 40] = torch.inf
    shown = quantise(weight, format, by_columns=True).dequantised()
    assert shown[7, 32:64].isnan().all()
    assert shown.isnan().sum() == 32
    assert torch.equal(shown[:, :32], plain[:, :32])


@formats
def test_a_block_of_zeros_stays_zero(format: BlockFormat) -> None:
    assert torch.equal(quantise(torch.zeros(2, 40), format).dequantised(), torch.zeros(2, 40))


@pytest.fixture
def load(stock: dict[str, Path]) -> Callable[[str], Any]:
    return lambda kind: load_sparse(stock[kind], "drelu")


def round_input(_module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (rounded_states(arguments[0]).to(arguments[0]), *arguments[1:])


@torch.no_grad()
def rounded(model: Any, format: BlockFormat) -> Any:
    """The model with weights that are what their blocks stand for, and with the states that these are multiplied with."""
    model = copy.deepcopy(model)

    def of(weight: torch.Tensor, format: BlockFormat = format, by_columns: bool = False) -> torch.Tensor:
        return quantise(weight, format, by_columns=by_columns).dequantised(dtype=weight.dtype)

    linears = [getattr(layer.self_attn, f"{one}_proj") for layer in model.model.layers for one in "qkvo"]
    for block in model.ffn_blocks():
        if hasattr(block, "gate_up_proj"):
            for gate_up, down in zip(block.gate_up_proj, block.down_proj, strict=True):
                gate_up.copy_(of(gate_up))
                down.copy_(of(down.T, by_columns=True).T)
            block.register_forward_pre_hook(round_input)
        else:
            linears += [block.gate_proj, block.up_proj]
            block.down_proj.weight.copy_(of(block.down_proj.weight.T, by_columns=True).T)
    for linear in linears:
        linear.weight.copy_(of(linear.weight))
    model.lm_head.weight.copy_(of(model.lm_head.weight, "int8"))
    for linear in (*linears, model.lm_head):
        linear.register_forward_pre_hook(round_input)
    return model


SEQUENCES = torch.randint(3, 60, (10, 3), generator=torch.Generator().manual_seed(0))


def same_logits(model: Any, reference: Any) -> None:
    """The same, but for tokens with a state that lies between two steps and is rounded to the other one by the last bits of a sum.

    Sequences are independent, so most tokens are not such.
    """
    given = torch.cat([decoded_logits(model, ids) for ids in SEQUENCES.split([1, 2, 7])])
    expected = decoded_logits(reference, SEQUENCES)
    wrong = (given - expected).abs().amax(-1) / expected.abs().max()
    assert wrong.max() < 0.03
    assert (wrong < 3e-5).float().mean() > 0.4


@kinds
@formats
def test_decoding_is_that_of_the_rounded_weights(kind: str, format: BlockFormat, load: Callable) -> None:
    model = load(kind)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    reference = rounded(model, format)
    acceleration = accelerate(model, weights=format)
    generate(model, do_sample=False)
    acceleration.reset()
    same_logits(model, reference)
    factors = 4 * model.config.hidden_size  # of down_proj's outputs
    for reads in acceleration.reads:
        assert reads.rows.down < reads.rows.up < reads.rows.gate == reads.offered
        blocks = reads.offered / model.config.intermediate_size
        assert reads.bytes_read == reads.rows.total * model.config.hidden_size * BITS[format] / 8 + blocks * factors
    head = model.lm_head.weight.numel()
    small = model.model.embed_tokens.weight.numel() + sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    small += sum(p.numel() for n, p in model.named_parameters() if n.endswith("mlp.gate.weight"))
    rest = sum(p.numel() for p in model.parameters()) - head - small
    blocks = len(model.model.layers) * (1 if kind == "mistral" else model.config.num_local_experts)
    assert acceleration.kept_bytes == (rest * BITS[format] + head * BITS["int8"]) / 8 + blocks * factors
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@kinds
def test_blocks_follow_weights_that_change(kind: str, load: Callable) -> None:
    model = load(kind)
    accelerate(model, weights="int8")

    def loaded() -> None:
        model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})

    def assigned() -> None:
        model.load_state_dict({n: 1.1 * v for n, v in model.state_dict().items()}, assign=True)

    def stepped() -> None:
        model(torch.arange(3, 15)[None]).logits.square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        model.zero_grad()

    def cast_there_and_back() -> None:
        model.bfloat16().float()

    for change in (loaded, assigned, stepped, cast_there_and_back):
        before = decoded_logits(model)
        change()
        fresh = copy.deepcopy(model)
        accelerate(fresh).remove()
        same_logits(model, rounded(fresh, "int8"))
        assert not torch.equal(decoded_logits(model), before)


def test_what_is_written_through_data_is_seen_by_accelerating_again(load: Callable) -> None:
    """torch does not count it; docs/decoding.md says so."""
    model = load("mistral")
    accelerate(model, weights="int8")
    before = decoded_logits(model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2.0)
    assert torch.equal(decoded_logits(model), before)
    accelerate(model, weights="int8")
    assert not torch.equal(decoded_logits(model), before)


@kinds
def test_copies_make_their_own_blocks(kind: str, load: Callable) -> None:
    model = load(kind)
    acceleration = accelerate(model, weights="int4")
    expected = decoded_logits(model)
    twin = copy.deepcopy(model)
    # Not to the bit: on some processors torch's dense layers round by the alignment of a copy's memory.
    torch.testing.assert_close(decoded_logits(twin), expected, rtol=0, atol=1e-5)
    unpickled = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(decoded_logits(unpickled), expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(decoded_logits(twin), expected, atol=1e-2)
    assert torch.equal(decoded_logits(model), expected)
    acceleration.remove()
    assert not torch.equal(decoded_logits(model), expected)


def test_blocks_elsewhere_than_on_a_cpu_are_refused(load: Callable) -> None:
    moved = load("mistral")
    accelerate(moved, weights="int8")
    moved.to("meta")
    with pytest.raises(ModelError, match="int8 blocks can only be read on a CPU"):
        moved(torch.arange(3, 5, device="meta")[None])
    with pytest.raises(ModelError, match="int4 blocks can only be read on a CPU"):
        accelerate(moved, weights="int4")
    with pytest.raises(ModelError, match="'fp8'"):
        accelerate(load("mistral"), weights="fp8")


@kinds
@formats
def test_blocks_alone_give_the_same_and_hold_the_weights_once(kind: str, format: BlockFormat, load: Callable) -> None:
    model, beside = load(kind), load(kind)
    reference = rounded(model, format)
    accelerate(model, weights=format, keep_weights=False)
    accelerate(beside, weights=format)
    same_logits(model, reference)
    assert torch.equal(decoded_logits(model), decoded_logits(beside))
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, reference(ids).logits, rtol=1e-4, atol=1e-5)
    left = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    assert all("norm" in name or "embed_tokens" in name or name.endswith("mlp.gate.weight") for name in left)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(decoded_logits(twin), decoded_logits(model), rtol=0, atol=1e-5)


def test_blocks_alone_can_be_neither_saved_nor_undone(load: Callable, tmp_path: Path) -> None:
    model = load("mistral")
    acceleration = accelerate(model, weights="int8", keep_weights=False)
    for attempt in (
        acceleration.remove,
        lambda: accelerate(model),
        lambda: model.save_pretrained(tmp_path / "saved"),
    ):
        with pytest.raises(ModelError, match="holds its weights in blocks alone"):
            attempt()
    assert not (tmp_path / "saved").exists()


def test_rounded_states_keep_what_is_not_finite_in_its_block() -> None:
    x = torch.randn(2, 70)
    x[0, 40], x[1, 69] = torch.inf, torch.nan
    rounded_x = rounded_states(x)
    assert rounded_x[0, 32:64].isnan().all()
    assert rounded_x[1, 64:].isnan().all()
    assert rounded_x.isnan().sum() == 32 + 6
    clean = rounded_states(torch.randn(3, 64))
    torch.testing.assert_close(rounded_states(clean), clean)
    assert torch.equal(rounded_states(torch.zeros(1, 40)), torch.zeros(1, 40))
