"""Counts of values in bins of equal width on a scale, so that a quantile of any number of values needs none of them stored."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

Scale = Literal["linear", "log", "log2"]

_ONTO_SCALE: dict[Scale, Callable[[torch.Tensor], torch.Tensor]] = {
    "linear": lambda values: values,
    "log": torch.log,
    "log2": torch.log2,
}
_FROM_SCALE: dict[Scale, Callable[[float], float]] = {
    "linear": lambda place: place,
    "log": math.exp,
    "log2": lambda place: 2.0**place,
}

PIECE_VALUES = 1 << 20


@dataclass(frozen=True)
class Bins:
    """Where the bins lie. Entry 0 of a histogram holds everything up to the lowest edge, zeros on a logarithmic scale among it;
    entry i the values between edges i - 1 and i; the last one also all that is larger.

    Attributes:
        scale: On which the bins are equally wide; values on a logarithmic one are magnitudes.
        lowest: Edge 0, on the scale.
        per_unit: Bins of one unit of the scale.
        includes_upper: Whether a value on an edge belongs below it.
    """

    scale: Scale
    lowest: float
    per_unit: float
    num_bins: int
    includes_upper: bool = True

    def edge(self, index: int) -> float:
        """The value at the upper end of an entry; 0 for entry 0 of a logarithmic scale."""
        if index == 0 and self.scale != "linear":
            return 0.0
        return _FROM_SCALE[self.scale](self.lowest + index / self.per_unit)

    def entries(self, values: torch.Tensor) -> torch.Tensor:
        """Index of the entry of each value, int64 of the same shape."""
        places = (_ONTO_SCALE[self.scale](values.float()) - self.lowest) * self.per_unit
        # Clamped while still a float: the logarithm of 0 is -inf, which no integer holds.
        if self.includes_upper:
            return places.ceil().clamp(0, self.num_bins).long()
        return places.clamp(-1, self.num_bins - 1).floor().long() + 1


THRESHOLD_BINS = Bins("log", lowest=-60.0, per_unit=200, num_bins=24_000, includes_upper=False)
"""A bin is half a per cent wide; e^-60 and less counts as zero."""


class Histogram:
    """One or several rows of counts.

    Attributes:
        counts: int64 [rows, bins + 1].
    """

    def __init__(self, bins: Bins, num_rows: int = 1, device: torch.device | str = "cpu") -> None:
        self.bins = bins
        self.counts = torch.zeros(num_rows, bins.num_bins + 1, dtype=torch.int64, device=device)

    def add(self, values: torch.Tensor, row: int = 0) -> None:
        # In pieces: the entries of all values at once would take several times the memory of the values.
        pieces = values.flatten().split(PIECE_VALUES)
        counted = [torch.bincount(self.bins.entries(piece), minlength=self.bins.num_bins + 1) for piece in pieces]
        self.counts[row] += torch.stack(counted).sum(0).to(self.counts.device)

    def total(self, row: int = 0) -> int:
        return int(self.counts[row].sum())

    def quantile(
        self,
        share: float,
        row: int = 0,
        *,
        of_nonzero: bool = False,
        rank: Callable[[float], int] = math.ceil,
    ) -> float:
        """The lowest edge that at least `share` of a row's values, or of those outside entry 0, do not exceed; `rank`
        makes a whole number of values of the share.
        """
        counts = self.counts[row].clone()
        if of_nonzero:
            counts[0] = 0
        cumulative = counts.cumsum(0)
        wanted = rank(share * int(cumulative[-1]))
        return self.bins.edge(int(torch.searchsorted(cumulative, wanted)))

    def above(self, index: int, row: int = 0) -> int:
        return int(self.counts[row, index + 1 :].sum())
