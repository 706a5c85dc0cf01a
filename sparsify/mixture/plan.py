"""Which source gives which window: exact token shares at every moment of a run, without any state.

All windows hold the same number of tokens, so shares of tokens are shares of windows. Drawing sources at random
would keep them on average only; over a run's last checkpoint, a short sweep or a rare source that is not enough.
Instead windows are handed out as fairly as integers allow: after n windows, a source with share s has given s * n of
them, rounded up or down. Because source and position follow from the window's number alone, resuming takes one
integer, and neither the number of processes nor the order of reading changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

BLOCK_WINDOWS = 1 << 12
LARGEST_DENOMINATOR = 10**9
"""Shares are taken as the closest fraction up to this denominator: 0.15 is 3/20, not the binary float beside it."""


class SourceSchedule:
    """Maps a global window index to a source and the index of the window within that source.

    This is Tijdeman's solution of the chairman assignment problem: k unions share a yearly chair in proportion to their
    sizes. Every window of a source has a first moment at which it may be given, and a deadline; the most urgent
    one is given. For k sources with shares s_i and any n, the windows x_i(n) of source i among the first n satisfy

        |x_i(n) - s_i * n| <= 1 - 1 / (2k - 2) < 1,

    a bound that no schedule can lower for all shares. Computed in exact integers.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), 323-330.

    Args:
        shares: Share of each source, above 0. Divided by their sum, should it differ from 1.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        # By name, so that the order in which a YAML file lists its sources changes nothing.
        self.names = sorted(shares)
        fractions = [
            Fraction(str(shares[name])).limit_denominator(LARGEST_DENOMINATOR)
            for name in self.names
        ]
        total = sum(fractions)
        self.shares = {
            name: share / total for name, share in zip(self.names, fractions, strict=True)
        }
        self.period = math.lcm(*(share.denominator for share in self.shares.values()))
        """Windows after which the schedule repeats: there all shares are met exactly, and everything starts anew."""
        self._given = _FairOrder([int(share * self.period) for share in self.shares.values()])
        self._source = np.empty(0, dtype=np.int16)  # of each window
        self._rank = np.empty(0, dtype=np.int64)  # of each window within its source

    def locate(self, index: int) -> tuple[str, int]:
        """Source of a global window, and the window's index within that source."""
        periods, position = divmod(index, self.period)
        self._compute(position + 1)
        source = self._source[position]
        return self.names[source], periods * self._given.weights[source] + int(self._rank[position])

    def windows_of(self, start: int, count: int) -> list[tuple[str, int]]:
        """`locate` of the global windows start, …, start + count - 1."""
        return [self.locate(index) for index in range(start, start + count)]

    def counts(self, num_windows: int) -> dict[str, int]:
        """Windows that each source gives among the first `num_windows`."""
        periods, rest = divmod(num_windows, self.period)
        self._compute(rest)
        given = np.bincount(self._source[:rest], minlength=len(self.names))
        return {
            name: periods * self._given.weights[source] + int(given[source])
            for source, name in enumerate(self.names)
        }

    def _compute(self, num_windows: int) -> None:
        """Extends the table to at least this many windows."""
        known = len(self._source)
        if num_windows <= known:
            return
        # Doubling keeps the copies below cheap when windows are asked for one by one.
        count = min(max(num_windows, 2 * known, BLOCK_WINDOWS), self.period) - known
        source, rank = self._given.next_windows(count)
        self._source = np.concatenate([self._source, source])
        self._rank = np.concatenate([self._rank, rank])


class _FairOrder:
    """Hands out windows one by one, by earliest deadline among those that may be given.

    With share s = p / D and c = 2k - 2, Tijdeman gives the window x (from 0) of a source not before the first n with
    s * n - x >= 1 / c, and orders by the deadline (x + 1 - 1 / c) / s. Both are kept as integers: the first n as
    ceil(D * (c * x + 1) / (c * p)), the deadline times c * L / D, where L is a common multiple of all p.
    """

    def __init__(self, weights: list[int]) -> None:
        self.weights, self.period = weights, sum(weights)
        self.slack = max(2 * len(weights) - 2, 1)
        self.moment = 0
        multiple = math.lcm(*weights)
        self.urgency = [multiple // weight for weight in weights]
        self.given = [0] * len(weights)
        self.release = [self._release(source) for source in range(len(weights))]
        self.deadline = [self._deadline(source) for source in range(len(weights))]

    def next_windows(self, count: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
        """Source and index within the source of the next `count` windows."""
        sources = np.empty(count, dtype=np.int16)
        ranks = np.empty(count, dtype=np.int64)
        everyone = range(len(self.weights))
        for position in range(count):
            self.moment += 1
            ready = [source for source in everyone if self.release[source] <= self.moment]
            chosen = min(ready, key=self.deadline.__getitem__)
            sources[position], ranks[position] = chosen, self.given[chosen]
            self.given[chosen] += 1
            self.release[chosen] = self._release(chosen)
            self.deadline[chosen] = self._deadline(chosen)
        return sources, ranks

    def _release(self, source: int) -> int:
        return -(
            -self.period
            * (self.slack * self.given[source] + 1)
            // (self.slack * self.weights[source])
        )

    def _deadline(self, source: int) -> int:
        return (self.slack * (self.given[source] + 1) - 1) * self.urgency[source]
