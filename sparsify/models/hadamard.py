"""Products with Hadamard matrices: orthogonal, of entries that are all of the same size, and cheap.

The matrix of size n = K · 2^m is H_K ⊗ S, S Sylvester's of size 2^m, divided by √n. H_K is Paley's (K = q + 1 or 2 (q + 1) for a
power q of a prime), and K the smallest such number that the sizes allow; 1 where n is a power of two. A product with S takes m
additions for each element, one with H_K takes K multiplications.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch

LARGEST_CORE = 1024
"""Largest K: beyond it a product would cost as much as one with a dense matrix."""
MAX_DEGREE = 3


def core_order(size: int) -> int | None:
    """K of the Hadamard matrix of a size; None where there is none here."""
    core = size & -size  # the largest power of two that divides it
    core = size // core
    while size % core == 0 and core <= LARGEST_CORE:
        if core == 1 or _field_of(core) is not None:
            return core
        core *= 2
    return None


def hadamard(size: int) -> torch.Tensor:
    """The orthogonal matrix, float64 [size, size]: each element is 1/√size or -1/√size.

    Raises:
        ValueError: If there is none of that size here.
    """
    return multiply(torch.eye(size, dtype=torch.float64))


def multiply(x: torch.Tensor, dim: int = -1, *, inverse: bool = False) -> torch.Tensor:
    """x with its rows along one dimension multiplied by the Hadamard matrix of their length: `x @ hadamard(n)` for the last one.

    Args:
        x: Of any shape.
        dim: Along which.
        inverse: Whether to multiply by the inverse, which is the transpose.

    Raises:
        ValueError: If there is none of that size here.
    """
    if dim not in (-1, x.dim() - 1):
        return multiply(x.transpose(dim, -1), inverse=inverse).transpose(dim, -1)
    size = x.shape[-1]
    core = core_order(size)
    if core is None:
        raise ValueError(f"there is no Hadamard matrix of size {size} here")
    values = x.reshape(*x.shape[:-1], core, size // core)
    half = 1
    while half < size // core:  # butterflies: pairs at a distance of `half`
        pairs = values.unflatten(-1, (-1, 2, half))
        first, second = pairs.unbind(-2)
        values = torch.stack([first + second, first - second], -2).flatten(-3)
        half *= 2
    if core > 1:
        matrix = paley(core).to(x)
        values = torch.einsum("...kn,kj->...jn", values, matrix.T if inverse else matrix)
    return (values * size**-0.5).reshape(x.shape)


@lru_cache(maxsize=16)
def paley(order: int) -> torch.Tensor:
    """Paley's Hadamard matrix, of 1 and -1, float64 [order, order]. Raises ValueError if there is none of that order."""
    field = _field_of(order)
    if field is None:
        raise ValueError(f"Paley's constructions give no Hadamard matrix of order {order}")
    prime, degree = field
    characters = _quadratic_characters(prime, degree)
    size, is_symmetric = prime**degree, prime**degree % 4 == 1
    bordered = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    bordered[1:, 1:] = characters
    bordered[0, 1:] = 1.0
    bordered[1:, 0] = 1.0 if is_symmetric else -1.0
    one = torch.eye(size + 1, dtype=torch.float64)
    if not is_symmetric:
        return one + bordered
    return torch.kron(bordered, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)) + torch.kron(
        one, torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    )


def _field_of(order: int) -> tuple[int, int] | None:
    """Prime and degree of the finite field that a Hadamard matrix of that order is made from."""
    for size, remainder in ((order - 1, 3), (order // 2 - 1, 1)):
        if order % 4 == 0 and size % 4 == remainder and (field := _prime_power(size)) is not None:
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    prime = next((one for one in range(2, int(number**0.5) + 1) if number % one == 0), number)
    degree = 1
    while prime**degree < number:
        degree += 1
    return (prime, degree) if number > 1 and prime**degree == number and degree <= MAX_DEGREE else None


def _quadratic_characters(prime: int, degree: int) -> torch.Tensor:
    """Of all differences of two elements of a field: 1 for squares, -1 for others, 0 for 0. [elements, elements]"""
    elements = list(product(range(prime), repeat=degree))  # coefficients, lowest first
    reduced = _irreducible(prime, degree)
    places = prime ** torch.arange(degree - 1, -1, -1)
    digits = torch.tensor(elements)
    of_element = torch.full((len(elements),), -1.0, dtype=torch.float64)
    for element in elements:
        of_element[int((torch.tensor(_square(element, reduced, prime)) * places).sum())] = 1.0
    of_element[0] = 0.0
    return of_element[(((digits[:, None] - digits[None]) % prime) * places).sum(-1)]


def _square(element: tuple[int, ...], reduced: tuple[int, ...], prime: int) -> list[int]:
    """The square of a polynomial where x^degree is `reduced`."""
    degree = len(element)
    powers = [0] * (2 * degree - 1)
    for i, a in enumerate(element):
        for j, b in enumerate(element):
            powers[i + j] += a * b
    for power in range(2 * degree - 2, degree - 1, -1):
        for i, coefficient in enumerate(reduced):
            powers[power - degree + i] += powers[power] * coefficient
    return [one % prime for one in powers[:degree]]


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """What x^degree is in a field of prime^degree elements: a polynomial such that x^degree less that has no root."""
    if degree == 1:
        return (0,)
    for reduced in product(range(prime), repeat=degree):
        if all((x**degree - sum(c * x**i for i, c in enumerate(reduced))) % prime for x in range(prime)):
            return reduced  # of degree 2 or 3, without a root, it has no factors
    raise AssertionError(f"there is a field of {prime}^{degree} elements")
