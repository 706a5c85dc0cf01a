"""Packed weights: what is packed is read again, and blocks computed from it are those in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.conversion.sparse_folder import load_sparse
from sparsify.errors import ModelError
from sparsify.models.quantised import BlockFormat, quantise
from sparsify.runtime import FfnWeights, accelerate
from sparsify.runtime.ffn import sparse_ffn
from sparsify.runtime.packed import PACKED, PackedFormat, pack
from tests.runtime.blocks import ALL, IDS, block, decoded_logits, difference, products_of, thresholds_between

FORMATS = list(PACKED.values())
formats = pytest.mark.parametrize("format", FORMATS)


@pytest.fixture(autouse=True)
def _compiled(native: str) -> None:
    """Blocks here are computed by the compiled kernel."""


def sparse(weight: torch.Tensor, share: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return weight.masked_fill(torch.rand(weight.shape, generator=generator) < share, 0.0)


@formats
@settings(max_examples=40)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 1200),
    share=st.sampled_from([0.0, 0.3, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 10**6),
)
def test_what_is_packed_is_what_is_unpacked(
    format: PackedFormat, rows: int, columns: int, share: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = sparse(torch.randn(rows, columns), share, seed).bfloat16()
    packed = pack(weight, format)
    wanted = weight.float()
    if format != "packed_bf16":
        wanted = quantise(weight, "int8" if format == "packed_int8" else "int4").dequantised()
    assert torch.equal(packed.dequantised(), wanted)
    assert torch.equal(packed.dequantised(torch.tensor([rows - 1])), wanted[-1:])
    if format != "packed_bf16":
        wanted = quantise(weight, "int8" if format == "packed_int8" else "int4", by_columns=True).dequantised()
        assert torch.equal(pack(weight, format, by_columns=True).dequantised(), wanted)


def test_its_size_is_what_the_bound_says() -> None:
    weight = sparse(torch.randn(64, 4096), 0.5, 0).bfloat16()
    stored = int((weight != 0).sum())
    assert pack(weight, "packed_bf16").nbytes == 64 * (8 + 4 * 8 + 4096 // 8) + 2 * stored
    assert pack(weight, "packed_int8").nbytes <= 64 * (8 + 4 * 8 + 4096 // 8 + 4096 // 32 * 2) + stored


shapes = given(
    tokens=st.integers(1, 8),
    hidden=st.integers(1, 700),
    neurons=st.integers(1, 90),
    share=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    activation=st.sampled_from(list(ALL)),
    mask=st.booleans(),
    threads=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
)


def sparse_parts(
    tokens: int, hidden: int, neurons: int, share: float, seed: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """x [tokens, hidden] in bf16, and gate, up and down_t without a share of their weights."""
    x, dense = block(tokens, hidden, neurons, torch.bfloat16, seed=seed)
    parts = [one for one in (dense.gate, dense.up, dense.down_t) if isinstance(one, torch.Tensor)]
    return x, [sparse(one, share, seed + number) for number, one in enumerate(parts)]


@settings(max_examples=60)
@shapes
def test_packed_bf16_gives_what_float64_gives(
    tokens: int,
    hidden: int,
    neurons: int,
    share: float,
    activation: str,
    mask: bool,
    threads: int,
    seed: int,
) -> None:
    x, parts = sparse_parts(tokens, hidden, neurons, share, seed)
    plain, own = FfnWeights(*(one.double() for one in parts)), ALL[activation]
    thresholds = thresholds_between(products_of(x.double(), plain, own)) if mask else None
    plain = replace(plain, thresholds=thresholds)
    packed = FfnWeights(*(pack(one, "packed_bf16") for one in parts), thresholds=thresholds)
    for backend in ("native", "torch"):
        found, _ = sparse_ffn(x, packed, own, backend=backend, threads=threads)
        assert difference(found, x, plain, own) <= 2e-2


@pytest.mark.parametrize("format", ["int8", "int4"])
@settings(max_examples=60)
@shapes
def test_packed_blocks_give_what_blocks_give(
    format: BlockFormat,
    tokens: int,
    hidden: int,
    neurons: int,
    share: float,
    activation: str,
    mask: bool,
    threads: int,
    seed: int,
) -> None:
    """Factors are the same, since both are whole numbers in a block; sums of rows are rounded otherwise."""
    x, parts = sparse_parts(tokens, hidden, neurons, share, seed)
    blocks = FfnWeights(*(quantise(one, format) for one in parts))
    packed = FfnWeights(*(pack(one, PACKED[format]) for one in parts))
    wanted, rows = sparse_ffn(x, blocks, ALL[activation], backend="native", threads=threads)
    found, same = sparse_ffn(x, packed, ALL[activation], backend="native", threads=threads)
    assert (rows.gate, rows.up, rows.down) == (same.gate, same.up, same.down)
    sizes = wanted.float().abs().max() + found.float().abs().max()
    assert float((found.float() - wanted.float()).abs().max()) <= 2e-2 * float(sizes)


@formats
def test_the_result_does_not_depend_on_threads(format: PackedFormat) -> None:
    x, dense = block(3, 1100, 300, torch.bfloat16, on=0.5)
    parts = [pack(sparse(one, 0.6, 1), format) for one in (dense.gate, dense.up, dense.down_t)]  # type: ignore[arg-type]
    weights = FfnWeights(*parts)
    one, two = (sparse_ffn(x, weights, ALL["drelu"], backend="native", threads=threads)[0] for threads in (1, 2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("kind", ["mistral", "mixtral"])
@pytest.mark.parametrize(
    ("activation", "weights"), [("swiglu", "stored"), ("drelu", "stored"), ("drelu", "int8"), ("drelu", "int4")]
)
def test_a_model_with_sparse_weights_decodes_as_before_and_reads_fewer_bytes(
    kind: str, activation: str, weights: str, stock: dict[str, Path]
) -> None:
    model = load_sparse(stock[kind], activation, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_proj" in name:
                parameter.copy_(sparse(parameter, 0.7, len(name)))
    if weights == "stored":
        with pytest.raises(ModelError, match="dense") if activation == "swiglu" else _nothing():
            accelerate(model).remove()
    model.config.weight_sparsity = {"method": "magnitude", "pattern": "unstructured", "sparsity": 0.7}
    apart = accelerate(model, weights=weights, dense=activation == "swiglu", packed=False)
    expected = decoded_logits(model)
    unpacked_bytes = sum(reads.bytes_read for reads in apart.reads)
    unpacked_other = apart.other_bytes
    apart.remove()
    acceleration = accelerate(model, weights=weights)
    found = decoded_logits(model)
    # A row of 32 weights has 12 bytes of places, which a longer one hides.
    assert acceleration.kept_bytes > 0
    tolerance = 0.02 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
    if weights == "stored":
        assert sum(reads.bytes_read for reads in acceleration.reads) < unpacked_bytes
        assert acceleration.other_bytes < unpacked_other
    rows = [reads.rows for reads in acceleration.reads]
    assert all((one.down < one.offered) == (activation == "drelu") for one in rows)
    acceleration.remove()


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def test_packed_weights_need_bf16_or_blocks(stock: dict[str, Path]) -> None:
    model = load_sparse(stock["mistral"], "drelu")
    with pytest.raises(ModelError, match=r"packed as bf16, and the model's are torch\.float32"):
        accelerate(model, packed=True)
    accelerate(model, weights="int8", packed=True).remove()
    model.bfloat16()
    accelerate(model, packed=True)
    model.float()
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match=r"torch\.float32 now, and its sparse weights were packed as bf16"),
    ):
        model(IDS[:, :1])
