"""Projections of integers: each piece against loops in float64, and what padding and packed documents owe each other."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from sparsify.models import SparseModel, family_of
from sparsify.models.hadamard import hadamard
from sparsify.models.integer_linear import (
    LEAST_PEAK,
    IntegerLinear,
    Sequences,
    packed,
    quantisation,
    rounded,
    rounded_cache,
    runtime_scales,
    unpacked,
)

FULL = {
    "method": "rrs",
    "weight_bits": 4,
    "activation_bits": 4,
    "smooth_group": 16,
    "smoothed": ["o_proj", "gate_proj", "up_proj", "down_proj"],
    "unquantised_inputs": [],
    "rotated_down": True,
    "rotated_heads": True,
    "kv_bits": 4,
}


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**31))
def test_packed_codes_are_unpacked_as_they_were(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(-8, 8, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    data = packed(codes)
    assert data.dtype == torch.uint8
    assert data.shape == (rows, (columns + 1) // 2)
    assert torch.equal(unpacked(data, columns), codes)
    assert int(data[0, 0]) & 15 == int(codes[0, 0]) % 16


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_that_of_a_loop_and_keeps_zeros(bits: int) -> None:
    x = seeded(6, 10) * torch.tensor([1e-6, 1, 100, 0, 1, 1])[:, None]
    x[1, 3] = 0.0
    top = 2 ** (bits - 1) - 1
    wanted = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        step = max(abs(float(one)) for one in row) / top
        for channel, value in enumerate(row):
            wanted[token, channel] = round(float(value) / step) * step if step else 0.0
    assert torch.allclose(rounded(x, bits).double(), wanted, rtol=1e-5, atol=1e-12)
    assert bool((rounded(x, bits)[x == 0] == 0).all())
    assert rounded(x, 16) is x


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**31))
def test_groups_of_sorted_channels_share_their_largest_peak(channels: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    peaks = torch.randint(1, 9, (2, channels), generator=generator).float()  # with equal ones
    scales = runtime_scales(peaks, group)
    for row, found in zip(peaks.tolist(), scales.tolist(), strict=True):
        order = sorted(range(channels), key=lambda channel: -row[channel])
        for start in range(0, channels, group):
            for channel in order[start : start + group]:
                assert found[channel] == row[order[start]]


def naive(layer: IntegerLinear, x: torch.Tensor, sequences: list[list[tuple[int, int]]]) -> torch.Tensor:
    """The projection in float64 for each of some sequences: lists of (row, token)."""
    weight = layer.codes().double() * layer.weight_scales.double()[:, None]
    matrix = hadamard(layer.turned) if layer.turned > 1 else torch.eye(1, dtype=torch.float64)
    matrix = torch.kron(matrix, torch.eye(layer.in_features // layer.turned, dtype=torch.float64))
    output = torch.zeros(*x.shape[:2], layer.out_features, dtype=torch.float64)
    for places in sequences:
        rows = torch.stack([x[place].double() @ matrix for place in places])
        scales = torch.ones(layer.in_features, dtype=torch.float64)
        if layer.smooth_group is not None:
            peaks = [max(max(abs(float(row[c])) for row in rows), LEAST_PEAK) for c in range(layer.in_features)]
            order = sorted(range(layer.in_features), key=lambda c: -peaks[c])
            for start in range(0, len(order), layer.smooth_group):
                for channel in order[start : start + layer.smooth_group]:
                    scales[channel] = peaks[order[start]]
        top = 2 ** (layer.activation_bits - 1) - 1
        for place, row in zip(places, rows, strict=True):
            smooth = row / scales
            step = float(smooth.abs().max()) / top
            output[place] = weight @ (torch.round(smooth / step) * step * scales)
    return output


def projection(
    turned: int = 1, group: int | None = 8, bits: int = 4, sequences: Sequences | None = None
) -> IntegerLinear:
    layer = IntegerLinear(
        24, 7, weight_bits=bits, activation_bits=bits, smooth_group=group, turned=turned, sequences=sequences
    )
    top = 2 ** (bits - 1)
    codes = torch.randint(-top, top, (7, 24), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    layer.weight_codes.copy_(packed(codes) if bits == 4 else codes)
    layer.weight_scales.copy_(seeded(7).abs() + 0.1)
    return layer.eval()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 1, 8, 10, 100])
@pytest.mark.parametrize("turned", [1, 4, 24])
def test_a_projection_is_that_of_loops(turned: int, group: int | None, bits: int) -> None:
    layer, x = projection(turned, group, bits), seeded(2, 5, 24, seed=1) * torch.logspace(-2, 1, 24)
    wanted = naive(layer, x, [[(row, token) for token in range(5)] for row in range(2)])
    assert torch.allclose(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)


def test_padding_is_in_no_maximum_and_packed_documents_are_apart() -> None:
    sequences = Sequences()
    layer, x = projection(sequences=sequences), seeded(2, 6, 24, seed=1)
    x[0, :2] *= 100.0
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    sequences.begin({"input_ids": torch.zeros(2, 6), "attention_mask": mask})
    wanted = naive(layer, x, [[(0, token) for token in range(2, 6)], [(1, token) for token in range(6)]])
    found = layer(x).double()
    assert torch.allclose(found[0, 2:], wanted[0, 2:], rtol=1e-4, atol=1e-4)
    assert torch.allclose(found[1], wanted[1], rtol=1e-4, atol=1e-4)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
    sequences.begin({"input_ids": torch.zeros(2, 6), "position_ids": positions})
    documents = [[(0, 0), (0, 1), (0, 2)], [(0, 3), (0, 4), (0, 5)], [(1, 0), (1, 1)], [(1, t) for t in range(2, 6)]]
    assert torch.allclose(layer(x).double(), naive(layer, x, documents), rtol=1e-4, atol=1e-4)


def test_one_token_smoothed_is_nearly_itself() -> None:
    x = seeded(1, 1, 24) * torch.logspace(-3, 2, 24)
    smooth, plain = projection(group=4), projection(group=None)
    error = [float((layer.read(x) - x).norm() / x.norm()) for layer in (smooth, plain)]
    assert error[0] < error[1]
    assert torch.allclose(projection(group=1).read(x), x, rtol=1e-5)


def test_scales_stay_in_fp32_whatever_the_model_is_cast_to() -> None:
    layer, x = projection(), seeded(1, 3, 24)
    before = layer(x)
    layer.to(torch.bfloat16)
    assert layer.weight_scales.dtype == torch.float32
    assert layer.weight_codes.dtype == torch.uint8
    assert torch.equal(layer(x), before)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.weight_scales.mul_(2)
    layer.load_state_dict(layer.state_dict())  # what was kept is made again
    assert torch.allclose(layer(x), 2 * before)


def test_a_cache_of_few_bits_has_few_values_and_the_extremes_of_its_group() -> None:
    x = seeded(1, 2, 5, 256)
    found = rounded_cache(x, 4)
    for group, old in zip(found.view(-1, 128), x.view(-1, 128), strict=True):
        assert len(group.unique()) <= 16
        assert torch.allclose(torch.stack(group.aminmax()), torch.stack(old.aminmax()), atol=1e-6)
        assert float((group - old).abs().max()) <= float(old.max() - old.min()) / 30 + 1e-6
    assert torch.equal(rounded_cache(torch.ones(1, 1, 1, 16), 4), torch.ones(1, 1, 1, 16))


@pytest.fixture(scope="module")
def model(family_stock: dict[str, Path]) -> SparseModel:
    fields = load_sparse(family_stock["qwen2"]).config.to_dict()
    config = sparse_config(fields | {"quantisation": FULL | {"rotated_down": False}}, "swiglu", "")
    made = family_of(config).model(config)
    torch.manual_seed(0)
    for name, buffer in made.named_buffers():
        if name.endswith("weight_codes"):
            buffer.copy_(torch.randint(0, 256, buffer.shape))
        elif name.endswith("weight_scales"):
            buffer.fill_(0.01)
    return made.eval()


@torch.no_grad()
def test_left_padding_and_packing_change_nothing(model: SparseModel) -> None:
    ids = torch.randint(3, 2000, (1, 9), generator=torch.Generator().manual_seed(0))
    other = torch.randint(3, 2000, (1, 6), generator=torch.Generator().manual_seed(1))
    alone = model(input_ids=ids, use_cache=False).logits
    padded = torch.cat([torch.full((1, 5), 7), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], dim=1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert torch.allclose(found[:, 5:], alone, atol=2e-5)
    both = torch.cat([ids, other], dim=1)
    packed_positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    found = model(input_ids=both, position_ids=packed_positions, use_cache=False).logits
    assert torch.allclose(found[:, :9], alone, atol=2e-5)
    assert torch.allclose(found[:, 9:], model(input_ids=other, use_cache=False).logits, atol=2e-5)


@torch.no_grad()
def test_the_cache_is_rounded_the_same_with_and_without_one(model: SparseModel) -> None:
    ids = torch.randint(3, 2000, (1, 9), generator=torch.Generator().manual_seed(0))
    without = model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(model(input_ids=ids, use_cache=True).logits, without, atol=1e-5)
    numbers = copy.deepcopy(model)
    for layer in numbers.model.layers:
        layer.self_attn.kv_bits = 16
    assert not torch.allclose(numbers(input_ids=ids).logits, without, atol=1e-4)
    assert numbers.model.sequences is not model.model.sequences
    assert numbers.model.layers[0].mlp.up_proj.sequences is numbers.model.sequences
    first = model(input_ids=ids[:, :4], use_cache=True)
    later = model(input_ids=ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
    assert later.past_key_values.get_seq_length() == 9


def test_a_gradient_through_integers_is_refused(model: SparseModel) -> None:
    trained = copy.deepcopy(model).train()
    with pytest.raises(RuntimeError, match="is not trained"):
        trained(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_bits": 3}, "weight_bits 3"),
        ({"activation_bits": 5}, "activation_bits 5"),
        ({"smooth_group": 0}, "smooth_group 0"),
        ({"smoothed": ["lm_head"]}, "lm_head"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_integers_that_the_code_does_not_compute_are_refused(
    change: dict[str, object], message: str, family_stock: dict[str, Path]
) -> None:
    fields = load_sparse(family_stock["mistral"]).config.to_dict()
    with pytest.raises(ModelError, match=message):
        sparse_config(fields | {"quantisation": FULL | change}, "swiglu", "config.json")


def test_experts_and_masks_of_single_projections_are_refused(family_stock: dict[str, Path]) -> None:
    plain = FULL | {"rotated_down": False, "rotated_heads": False}
    fields = load_sparse(family_stock["mixtral"]).config.to_dict()
    with pytest.raises(ModelError, match="experts"):
        sparse_config(fields | {"quantisation": plain}, "swiglu", "config.json")
    fields = load_sparse(family_stock["mistral"]).config.to_dict()
    mask = {"method": "own", "sites": {"attn_out": {"rule": "threshold", "per": "layer"}}}
    with pytest.raises(ModelError, match="attn_out"):
        sparse_config(fields | {"quantisation": plain, "sparsification": mask}, "swiglu", "config.json")


def test_words_and_bits_of_projections() -> None:
    stored = quantisation({"quantisation": FULL | {"unquantised_inputs": ["down_proj"]}})
    assert stored is not None
    assert stored.words == "W4A4 by rrs, keys and values in 4 bits"
    assert (stored.bits_of("down_proj"), stored.bits_of("q_proj")) == (16, 4)
    assert (stored.group_of("down_proj"), stored.group_of("q_proj"), stored.group_of("up_proj")) == (None, None, 16)
    assert quantisation({}) is None
