"""A matrix as integers: one scale for each output, chosen by the squared error that it leaves, and rounding to the nearest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.models.integer_linear import packed

SMALLEST_SHARE = 0.2
STEPS = 80
"""How many scales are tried, from that of the largest weight of a row down to SMALLEST_SHARE of it, as GPTQ's code does."""
CHUNK_WEIGHTS = 65_536
"""Weights that are tried at once, so that all passes but the first read them from the cache; the result does not depend on it."""


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix [outputs, inputs] of integers of so many bits.

    Attributes:
        codes: int8 [outputs, inputs], -2^(bits - 1) to 2^(bits - 1) - 1.
        scales: fp32 [outputs].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int

    def dequantised(self) -> torch.Tensor:
        """fp32 [outputs, inputs]."""
        return self.codes.float() * self.scales[:, None]

    @property
    def stored_codes(self) -> torch.Tensor:
        """As an `IntegerLinear` holds them."""
        return packed(self.codes) if self.bits == 4 else self.codes


def largest_code(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def best_scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Scale of each row of a matrix [outputs, inputs] in fp32: of those tried, the one whose rounding has the least squared error. [outputs]

    A row of zeros has the scale 1.
    """
    chunks = weight.split(max(CHUNK_WEIGHTS // max(weight.shape[1], 1), 1))
    return torch.cat([_best_scales(chunk, bits) for chunk in chunks])


def _best_scales(weight: torch.Tensor, bits: int) -> torch.Tensor:
    whole = weight.abs().amax(1) / largest_code(bits)
    whole = torch.where(whole > 0, whole, 1.0)
    best, least = whole, torch.full_like(whole, torch.inf)
    for step in range(STEPS + 1):
        scales = whole * (1 - step * (1 - SMALLEST_SHARE) / STEPS)
        error = (nearest(weight, scales, bits) * scales[:, None]).sub_(weight).square_().sum(1)
        best = torch.where(error < least, scales, best)
        least = torch.minimum(error, least)
    return best


def nearest(weight: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes of the nearest multiples of a row's scale, in the dtype of the weight [outputs, inputs]."""
    top = largest_code(bits)
    return (weight / scales[:, None]).round_().clamp_(-top - 1, top)


def round_to_nearest(weight: torch.Tensor, bits: int) -> IntegerMatrix:
    """A matrix [outputs, inputs] in fp32, each weight by itself."""
    scales = best_scales(weight, bits)
    return IntegerMatrix(nearest(weight, scales, bits).to(torch.int8), scales, bits)
