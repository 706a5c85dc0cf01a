"""Shares of sources over a run: constant in a phase, or moving in a straight line, as exact demand in sequences.

The demand of a source after n sequences is what it should have given by then: the sum of its shares over those sequences. Over all
sources it sums to n. Everything is computed in integers and fractions, so that a law that holds at the first sequence holds
at the last of a trillion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sparsify.recipe.mixture import MixtureSection

LARGEST_DENOMINATOR = 10**9
"""Shares are taken as the closest fraction up to this denominator: 0.15 is 3/20, not the binary float beside it."""


def token_shares(mixture: MixtureSection) -> dict[str, float]:
    """Share of every source in the tokens of a whole run; sources without any are left out."""
    means = dict.fromkeys(mixture.sources, 0.0)
    start = 0.0
    for end, first, last in share_phases(mixture):
        for name in means:
            means[name] += (end - start) * (first[name] + last[name]) / 2
        start = end
    return {name: share for name, share in means.items() if share > 0}


def share_phases(mixture: MixtureSection) -> list[tuple[float, dict[str, float], dict[str, float]]]:
    """For each phase: where it ends as a share of the budget, and the shares of all sources at its beginning and end."""
    if not mixture.phases:
        shares = _with_instructions(mixture, mixture.instruction_token_share)
        return [(1.0, shares, shares)]
    phases, before = [], dict.fromkeys(mixture.sources, 0.0)
    for phase in mixture.phases:
        if phase.token_shares:
            after = {name: phase.token_shares.get(name, 0.0) for name in mixture.sources}
        else:
            after = _with_instructions(mixture, phase.instruction_token_share)
        phases.append((phase.until_budget_share, before if phase.ramp else after, after))
        before = after
    return phases


def _with_instructions(mixture: MixtureSection, share: float | None) -> dict[str, float]:
    """The sources' own shares, moved so that the instruction group has `share`; as stated when that is None."""
    stated = {name: source.token_share for name, source in mixture.sources.items()}
    if share is None:
        return stated
    target = {"instruction": share, "pretraining": 1.0 - share}
    totals = dict.fromkeys(target, 0.0)
    for source in mixture.sources.values():
        totals[source.group] += source.token_share
    return {
        name: source.token_share / totals[source.group] * target[source.group]
        if totals[source.group]
        else 0.0
        for name, source in mixture.sources.items()
    }


def exact_shares(shares: Mapping[str, float | Fraction]) -> dict[str, Fraction]:
    """Shares as fractions that sum to 1; a fraction stays what it is in proportion to the others."""
    exact = {
        name: share
        if isinstance(share, Fraction)
        else Fraction(str(share)).limit_denominator(LARGEST_DENOMINATOR)
        for name, share in shares.items()
    }
    total = sum(exact.values())
    return {name: share / total for name, share in exact.items()}


@dataclass(frozen=True)
class Stretch:
    """A part of a run over which shares stay or move in a straight line.

    Attributes:
        end: PackedSequence at which it ends, counted from the run's start; the last stretch has no end.
        first: Share of each source at its beginning, above or equal to 0.
        last: Share of each source at its end.
    """

    end: int | None
    first: Mapping[str, float | Fraction]
    last: Mapping[str, float | Fraction]


@dataclass(frozen=True)
class _Piece:
    """One stretch in integers: demand(start + m) * denominator = base + linear * m + quadratic * m * m, for each source."""

    start: int
    end: float
    denominator: int
    base: tuple[int, ...]
    linear: tuple[int, ...]
    quadratic: tuple[int, ...]

    def scaled_demand(self, source: int, sequence: int) -> int:
        m = sequence - self.start
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

    @classmethod
    def of(cls, mixture: MixtureSection, num_sequences: int) -> Shares:
        """The shares that a mixture states for a run of `num_sequences`; its phases end at whole sequences."""
        return cls(
            [
                Stretch(round(end * num_sequences), first, last)
                for end, first, last in share_phases(mixture)
            ]
        )

    @property
    def period(self) -> int | None:
        """Sequences after which every demand is whole again, as long as the first stretch lasts; None if it is a ramp."""
        piece = self._pieces[0]
        if any(piece.quadratic):
            return None
        return piece.denominator // math.gcd(piece.denominator, *piece.linear)

    @property
    def first_change(self) -> float:
        """PackedSequence at which the first stretch ends."""
        return self._pieces[0].end

    def demand(self, source: str, sequence: int) -> Fraction:
        """What a source should have given among the first `sequence` sequences; 0 for one without any share."""
        if source not in self.names:
            return Fraction(0)
        index, piece = self.names.index(source), self._piece_of(sequence)
        return Fraction(piece.scaled_demand(index, sequence), piece.denominator)

    def planned(self, num_sequences: int) -> dict[str, int]:
        """Demand in whole sequences that sum to `num_sequences`: at most one from what the schedule gives, and known at once."""
        demand = {name: self.demand(name, num_sequences) for name in self.names}
        planned = {name: int(sequences) for name, sequences in demand.items()}
        missing = num_sequences - sum(planned.values())
        nearest = sorted(self.names, key=lambda name: planned[name] - demand[name])
        return planned | {name: planned[name] + 1 for name in nearest[:missing]}

    def reaches(self, source: int, numerator: int, denominator: int) -> float:
        """The first sequence n with demand(n) >= numerator / denominator; infinity if there is none.

        Args:
            source: Index in `names`.
            numerator: Of the demand to reach.
            denominator: Of the same, above 0.
        """
        return next(self.moments(source, numerator, denominator))

    def moments(self, source: int, numerator: int, denominator: int) -> Iterator[float]:
        """`reaches` of a demand, of that demand + 1, + 2, and so on for ever."""
        for piece in self._pieces:  # the last of them has no end, and infinity is not beyond it
            while True:
                # Demands are whole multiples of 1 / piece.denominator: round what is wanted up to the next of them.
                wanted = -(-numerator * piece.denominator // denominator)
                found = _first_reaching(piece, source, wanted)
                if found > piece.end:
                    break
                yield found
                numerator += denominator

    def share(self, source: str, sequence: int) -> float:
        """The share of a source round about a sequence."""
        return float(self.demand(source, sequence + 1) - self.demand(source, sequence))

    def _piece_of(self, sequence: int) -> _Piece:
        return next(piece for piece in self._pieces if sequence <= piece.end)

    def _fractions(self, shares: Mapping[str, float | Fraction]) -> list[Fraction]:
        exact = exact_shares(shares)
        return [exact.get(name, Fraction(0)) for name in self.names]

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
    """The first sequence of a piece at which a source's scaled demand is at least `wanted`; infinity if none is."""
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
