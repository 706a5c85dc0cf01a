"""Products of whole numbers equal the simulated arithmetic, computed naively in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.models.hadamard import hadamard
from sparsify.runtime.build import find_compiler
from sparsify.runtime.integer_products import TiledMatrix, integer_product, tiled, turned


@pytest.fixture(autouse=True, scope="module")
def integers() -> None:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")


def simulated(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, bits: int, group: int | None) -> torch.Tensor:
    """One sequence x [tokens, inputs], rounded channel by channel; codes exactly as fp32 rounds them, all else in float64."""
    weights = codes.double() * scales.double()[:, None]
    if bits == 16:
        return x.double() @ weights.T
    divisors = torch.ones(x.shape[1])
    if group is not None:
        peaks = [max(float(one.abs().max()), float(torch.tensor(1e-5))) for one in x.T]
        order = sorted(range(len(peaks)), key=lambda i: -peaks[i])
        for place, channel in enumerate(order):
            divisors[channel] = peaks[order[place // group * group]]
    top = 2 ** (bits - 1) - 1
    rows = []
    for token in x:
        smoothed = token / divisors
        step = smoothed.abs().max() / top
        rounded = torch.zeros_like(token) if step == 0 else (smoothed / step).round()
        rows.append(rounded.double() * step.double() * divisors.double())
    return torch.stack(rows) @ weights.T


def matrix(outputs: int, inputs: int, bits: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, TiledMatrix]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (outputs, inputs), generator=generator).to(torch.int8)
    scales = torch.rand(outputs, generator=generator) + 0.1
    return codes, scales, tiled(codes, scales, bits)


def assert_equal(found: torch.Tensor, expected: torch.Tensor, x: torch.Tensor, codes: torch.Tensor) -> None:
    """Up to the rounding of fp32 sums and of 21 bits, both of the largest that could be added up."""
    size = x.double().abs().amax(1, keepdim=True) * codes.double().abs().amax() * codes.shape[1] ** 0.5
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 4e-6 * size * 1.2 + 1e-30).all()


@settings(max_examples=150)
@given(
    st.integers(1, 70),
    st.integers(1, 400),
    st.sampled_from([1, 2, 3, 6, 7, 8, 13]),
    st.sampled_from([4, 8]),
    st.sampled_from([2, 4, 8, 16]),
    st.sampled_from([None, 1, 5, 32, 128, 1000]),
    st.sampled_from(["normal", "ties", "zeros", "outliers"]),
    st.integers(0, 1000),
)
def test_products_are_those_of_the_simulated_arithmetic(
    outputs: int, inputs: int, tokens: int, weight_bits: int, bits: int, group: int | None, kind: str, seed: int
) -> None:
    codes, scales, packed = matrix(outputs, inputs, weight_bits, seed)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(seed))
    if kind == "ties":  # many channels of one size, and values half way between two codes
        x = (x * 2).round() / 2
    elif kind == "zeros":
        x = x.relu() * (torch.arange(tokens) > 0)[:, None]
    elif kind == "outliers":
        x[:, ::17] *= 300
    found = integer_product(x, packed, bits, smooth_group=group, threads=1 + seed % 3)
    assert_equal(found, simulated(x, codes, scales, bits, group), x, codes)
    alone = integer_product(x, packed, bits, smooth_group=group, apart=True)
    each = torch.cat([simulated(one[None], codes, scales, bits, group) for one in x])
    assert_equal(alone, each, x, codes)


@pytest.mark.parametrize(("weight_bits", "bits", "group"), [(4, 4, None), (4, 4, 128), (8, 8, None), (4, 16, None)])
def test_long_prompts_and_wide_matrices(weight_bits: int, bits: int, group: int | None) -> None:
    codes, scales, packed = matrix(67, 3001, weight_bits)
    x = torch.randn(130, 3001, generator=torch.Generator().manual_seed(1))
    expected = simulated(x, codes, scales, bits, group)
    one = integer_product(x, packed, bits, smooth_group=group, threads=1)
    assert_equal(one, expected, x, codes)
    assert torch.equal(one, integer_product(x, packed, bits, smooth_group=group, threads=2))


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(bits: int, value: float) -> None:
    _, _, packed = matrix(33, 50, 4)
    x = torch.randn(3, 50)
    x[1, 7] = value
    found = integer_product(x, packed, bits)
    assert found.isnan().all(1).tolist() == [False, True, False]
    if bits < 16:
        assert integer_product(x, packed, bits, smooth_group=8).isnan().all()
        assert integer_product(x, packed, bits, smooth_group=8, apart=True).isnan().all(1).tolist() == [
            False,
            True,
            False,
        ]


def test_the_largest_sums_do_not_overflow() -> None:
    """Every product of the same sign and of the largest size, over more columns than 16 or 32 bits could hold at once."""
    for bits, inputs in ((4, 20_000), (8, 140_000)):
        codes = torch.full((2, inputs), -(2 ** (bits - 1)), dtype=torch.int8)
        packed = tiled(codes, torch.ones(2), bits)
        for tokens in (1, 20):
            found = integer_product(torch.full((tokens, inputs), -3.0), packed, 8)
            assert torch.allclose(found, torch.tensor(3.0 * inputs * 2 ** (bits - 1)), rtol=1e-5)


def test_shapes_and_bits_that_do_not_fit_are_refused() -> None:
    _, _, packed = matrix(8, 16, 8)
    with pytest.raises(ValueError, match=r"it must be \[tokens, 16\]"):
        integer_product(torch.randn(2, 15), packed, 8)
    with pytest.raises(ValueError, match="allowed: 2 to 8, 16"):
        integer_product(torch.randn(2, 16), packed, 12)
    with pytest.raises(ValueError, match="do not fit"):
        tiled(torch.zeros(4, 4), torch.ones(4), 8)


@pytest.mark.parametrize(("parts", "inner"), [(1, 3), (8, 1), (64, 5), (12, 1), (28 * 16, 1), (40, 2), (1536, 1)])
def test_a_turn_is_the_product_with_the_hadamard_matrix(parts: int, inner: int) -> None:
    x = torch.randn(3, parts * inner, generator=torch.Generator().manual_seed(parts))
    expected = torch.einsum("bni,nm->bmi", x.double().view(3, parts, inner), hadamard(parts)).flatten(1)
    assert torch.allclose(turned(x, parts).double(), expected, atol=1e-5)
    x[1, 0] = torch.nan
    assert turned(x, parts).isnan().any(1).tolist() == [False, True, False]
