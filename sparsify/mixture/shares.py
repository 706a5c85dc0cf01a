"""Shares of sources over a run: constant in a phase, or moving in a straight line, as exact demand in windows.

The demand of a source after n windows is what it should have given by then: the sum of its shares over those windows. Over all
sources it sums to n. Everything is computed in integers and fractions, so that a law that holds at the first window holds
at the last of a trillion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

LARGEST_DENOMINATOR = 10**9
"""Shares are taken as the closest fraction up to this denominator: 0.15 is 3/20, not the binary float beside it."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run over which shares stay or move in a straight line.

    Attributes:
        end: Window at which it ends, counted from the run's start; the last stretch has no end.
        first: Share of each source at its beginning, above or equal to 0.
        last: Share of each source at its end.
    """

    end: int | None
    first: Mapping[str, float]
    last: Mapping[str, float]


@dataclass(frozen=True)
class _Piece:
    """One stretch in integers: demand(start + m) * denominator = base + linear * m + quadratic * m * m, for each source."""

    start: int
    end: float
    denominator: int
    base: tuple[int, ...]
    linear: tuple[int, ...]
    quadratic: tuple[int, ...]

    def scaled_demand(self, source: int, window: int) -> int:
        m = window - self.start
        return self.base[source] + (self.linear[source] + self.quadratic[source] * m) * m


class Shares:
    """The demand of every source over a run.

    Args:
        stretches: From the run's beginning to beyond its end. Shares of each are divided by their sum, should it
            differ from 1. Sources that have no share anywhere are left out.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        self.stretches = list(stretches)
        # By name, so that the order in which a YAML file lists its sources changes nothing.
        named = {
            name
            for part in stretches
            for name, share in [*part.first.items(), *part.last.items()]
            if share
        }
        self.names = sorted(named)
        self._pieces: list[_Piece] = []
        demand = [Fraction(0)] * len(self.names)
        start = 0
        for part in stretches:
            first, last = self._fractions(part.first), self._fractions(part.last)
            if part.end is None or part.end > start:
                demand = self._append(start, part.end, first, last, demand)
                start = part.end or start
        if stretches[-1].end is not None:
            last = self._fractions(stretches[-1].last)
            self._append(start, None, last, last, demand)

    @classmethod
    def constant(cls, shares: Mapping[str, float]) -> Shares:
        """The same shares all the way."""
        return cls([Stretch(None, shares, shares)])

    @property
    def period(self) -> int | None:
        """Windows after which every demand is whole again, as long as the first stretch lasts; None if it is a ramp."""
        piece = self._pieces[0]
        if any(piece.quadratic):
            return None
        return piece.denominator // math.gcd(piece.denominator, *piece.linear)

    @property
    def first_change(self) -> float:
        """Window at which the first stretch ends."""
        return self._pieces[0].end

    def demand(self, source: str, window: int) -> Fraction:
        """What a source should have given among the first `window` windows; 0 for one without any share."""
        if source not in self.names:
            return Fraction(0)
        index, piece = self.names.index(source), self._piece_of(window)
        return Fraction(piece.scaled_demand(index, window), piece.denominator)

    def reaches(self, source: int, numerator: int, denominator: int, after: int = 0) -> float:
        """The first window n, not before `after`, with demand(n) >= numerator / denominator; infinity if there is none.

        Args:
            source: Index in `names`.
            numerator: Of the demand to reach.
            denominator: Of the same, above 0.
            after: Where to begin looking.
        """
        for piece in self._pieces:
            if piece.end <= after:
                continue
            # Demands are whole multiples of 1 / piece.denominator: round what is wanted up to the next of them.
            wanted = -(-numerator * piece.denominator // denominator)
            found = _first_reaching(piece, source, wanted)
            if found <= piece.end:
                return max(found, after)
        return math.inf

    def share(self, source: str, window: int) -> float:
        """The share of a source round about a window."""
        return float(self.demand(source, window + 1) - self.demand(source, window))

    def _piece_of(self, window: int) -> _Piece:
        return next(piece for piece in self._pieces if window <= piece.end)

    def _fractions(self, shares: Mapping[str, float]) -> list[Fraction]:
        exact = [
            Fraction(str(shares.get(name, 0.0))).limit_denominator(LARGEST_DENOMINATOR)
            for name in self.names
        ]
        return [share / sum(exact) for share in exact]

    def _append(
        self,
        start: int,
        end: int | None,
        first: list[Fraction],
        last: list[Fraction],
        demand: list[Fraction],
    ) -> list[Fraction]:
        """Adds a piece; returns the demand at its end."""
        length = 1 if end is None else end - start
        bend = [
            (b - a) / (2 * length) if end is not None else Fraction(0)
            for a, b in zip(first, last, strict=True)
        ]
        numbers = [*first, *bend, *demand]
        denominator = math.lcm(*(number.denominator for number in numbers))

        def scaled(values: list[Fraction]) -> tuple[int, ...]:
            return tuple(int(value * denominator) for value in values)

        piece = _Piece(
            start,
            math.inf if end is None else end,
            denominator,
            scaled(demand),
            scaled(first),
            scaled(bend),
        )
        self._pieces.append(piece)
        if end is None:
            return demand
        return [
            Fraction(piece.scaled_demand(source, end), denominator)
            for source in range(len(self.names))
        ]


def _first_reaching(piece: _Piece, source: int, wanted: int) -> float:
    """The first window of a piece at which a source's scaled demand is at least `wanted`; infinity if none is."""
    linear, quadratic = piece.linear[source], piece.quadratic[source]
    missing = wanted - piece.base[source]
    if missing <= 0:
        return piece.start
    if not quadratic:
        return piece.start + -(-missing // linear) if linear else math.inf
    root = linear * linear + 4 * quadratic * missing
    if root < 0:  # the falling share ends before
        return math.inf
    guess = (math.isqrt(root) - linear) // (2 * quadratic)
    m = max(guess - 2, 0)
    while (linear + quadratic * m) * m < missing:
        m += 1
        if piece.start + m > piece.end:
            return math.inf
    return piece.start + m


def last_window_within(shares: Shares, name: str, capacity: int) -> float:
    """How many windows a run may have before a source could be asked for more than `capacity` of them."""
    if name not in shares.names:
        return math.inf
    slack = max(2 * len(shares.names) - 2, 1)
    # A source is ahead of its demand by less than 1 - 1 / slack.
    reached = shares.reaches(shares.names.index(name), slack * (capacity - 1) + 1, slack)
    return max(reached - 1, 0)


def redistributed(shares: Shares, capacities: Mapping[str, int]) -> Shares:
    """The shares of a run in which sources stop giving when they are exhausted, and the others give more.

    From where a source is exhausted, its share goes to the others in proportion to theirs; in a ramp, at both its ends.
    After all are exhausted the shares stay what they were: `last_window_within` says where.

    Args:
        shares: The shares before.
        capacities: Most windows that a source may give.
    """
    open_sources = set(capacities) & set(shares.names)
    while open_sources:
        ends = {name: last_window_within(shares, name, capacities[name]) for name in open_sources}
        name = min(ends, key=lambda one: (ends[one], one))
        if ends[name] == math.inf or len(shares.names) == 1:
            break
        without = _without(shares.stretches, name, int(ends[name]))
        if without is None:
            break
        shares = Shares(without)
        open_sources.remove(name)
    return shares


def _without(stretches: Sequence[Stretch], name: str, window: int) -> list[Stretch] | None:
    """The stretches with a source's share given to the others from a window on; None if there are no others."""
    changed, start = [], 0
    for part in [*stretches, Stretch(None, stretches[-1].last, stretches[-1].last)]:
        end = math.inf if part.end is None else part.end
        if end <= window:
            changed.append(part)
        else:
            turn = max(window, start)
            middle = _between(part, start, turn)
            if start < turn:
                changed.append(Stretch(turn, part.first, middle))
            first, last = _shared_out(middle, name), _shared_out(part.last, name)
            if first is None or last is None:
                return None
            changed.append(Stretch(part.end, first, last))
        start = part.end or start
    return changed


def _between(part: Stretch, start: int, window: int) -> dict[str, float]:
    if part.end is None:
        return dict(part.first)
    way = (window - start) / (part.end - start)
    return {name: share + way * (part.last[name] - share) for name, share in part.first.items()}


def _shared_out(shares: Mapping[str, float], name: str) -> dict[str, float] | None:
    rest = sum(share for other, share in shares.items() if other != name)
    if rest <= 0:
        return None
    return {other: 0.0 if other == name else share / rest for other, share in shares.items()}
