"""Laws of Hadamard matrices, and sizes of published models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.models.hadamard import core_order, hadamard, multiply, paley

SIZES = [size for size in range(1, 260) if core_order(size) is not None]


@given(st.sampled_from(SIZES))
def test_it_is_orthogonal_and_its_elements_are_all_of_one_size(size: int) -> None:
    matrix = hadamard(size)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64), atol=1e-14)


@given(st.sampled_from(SIZES), st.integers(0, 2**31))
def test_a_product_keeps_norms_and_is_that_with_the_matrix_along_any_dimension(size: int, seed: int) -> None:
    x = torch.randn(3, size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    turned = multiply(x, 1)
    assert torch.allclose(turned, torch.einsum("anb,nm->amb", x, hadamard(size)), atol=1e-12)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), atol=1e-12)
    assert torch.allclose(multiply(x.float(), 1).double(), turned, atol=1e-5)


def test_a_matrix_of_a_power_of_two_is_sylvesters() -> None:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    assert torch.allclose(hadamard(8) * 8**0.5, torch.kron(pair, torch.kron(pair, pair)), atol=1e-12)


@pytest.mark.parametrize(
    ("size", "core"),
    [
        *((4096, 1), (14336, 28), (11008, 344), (13824, 108), (28672, 28), (5120, 20), (18944, 148), (8960, 140)),
        *((576, 36), (1536, 12), (640, 20), (96, 12), (4864, 76), (25600, 100), (9, None), (6, None), (3, None)),
    ],
)
def test_sizes_of_models(size: int, core: int | None) -> None:
    assert core_order(size) == core
    if core is not None and core > 1:
        own = paley(core)
        assert torch.equal(own @ own.T, core * torch.eye(core, dtype=torch.float64))


def test_a_size_without_a_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="size 9"):
        multiply(torch.ones(2, 9))
