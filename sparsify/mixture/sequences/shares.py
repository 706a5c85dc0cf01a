"""Shares of sources over a run, constant or linear within a segment, and their exact demand in sequences.

The demand of a source after n sequences is the integral of its share over them: the number of sequences that it should
have given. The demands of all sources sum to n. Everything is computed in integers and fractions, so that the bounds of
the schedule hold at the last of a trillion sequences as they do at the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from sparsify.recipe.mixture import MixtureSection

SHARE_DECIMALS = 9
"""Shares that agree to this many decimals are the same, whichever way a mixture states them."""
LARGEST_DENOMINATOR = 10**9
"""Shares are rounded to the closest fraction up to this denominator: 0.15 is 3/20, not the nearest binary float."""


class Phase(NamedTuple):
    """A phase of a mixture.

    Attributes:
        end: End of the phase as a share of the budget.
    """

    end: float
    first: dict[str, float]
    last: dict[str, float]


def token_shares(mixture: MixtureSection) -> dict[str, float]:
    """Share of each source in the tokens of a whole run; without the sources that have none."""
    means = dict.fromkeys(mixture.sources, 0.0)
    start = 0.0
    for end, first, last in share_phases(mixture):
        for name in means:
            means[name] += (end - start) * (first[name] + last[name]) / 2
        start = end
    return {name: share for name, share in means.items() if share > 0}


def share_phases(mixture: MixtureSection) -> list[Phase]:
    """The phases of a mixture; one phase if it states none."""
    if not mixture.phases:
        shares = _with_instructions(mixture, mixture.instruction_token_share)
        return [Phase(1.0, shares, shares)]
    phases, before = [], dict.fromkeys(mixture.sources, 0.0)
    for phase in mixture.phases:
        if phase.token_shares:
            after = {name: phase.token_shares.get(name, 0.0) for name in mixture.sources}
        else:
            after = _with_instructions(mixture, phase.instruction_token_share)
        phases.append(Phase(phase.until_budget_share, before if phase.ramp else after, after))
        before = after
    return phases


def _with_instructions(mixture: MixtureSection, share: float | None) -> dict[str, float]:
    """The sources' shares, scaled so that the instruction group has `share`; unchanged if that is None."""
    stated = {name: source.token_share for name, source in mixture.sources.items()}
    if share is None:
        return stated
    target = {"instruction": share, "pretraining": 1.0 - share}
    totals = dict.fromkeys(target, 0.0)
    for source in mixture.sources.values():
        totals[source.group] += source.token_share
    return {
        name: source.token_share / totals[source.group] * target[source.group] if totals[source.group] else 0.0
        for name, source in mixture.sources.items()
    }


def rounded_share(share: float) -> float:
    """A token share without the rounding errors of different ways to state it."""
    return round(share, SHARE_DECIMALS)


def exact_shares(shares: Mapping[str, float | Fraction]) -> dict[str, Fraction]:
    """Shares as fractions that sum to 1. Floats are rounded to fractions; fractions keep their proportions."""
    exact = {
        name: share if isinstance(share, Fraction) else Fraction(str(share)).limit_denominator(LARGEST_DENOMINATOR)
        for name, share in shares.items()
    }
    total = sum(exact.values())
    return {name: share / total for name, share in exact.items()}


@dataclass(frozen=True)
class ShareSegment:
    """A part of a run over which shares are constant or change linearly.

    Attributes:
        end: Number of sequences from the run's start to the segment's end; None for an endless last segment.
        first: Share of each source at the start of the segment, at least 0.
    """

    end: int | None
    first: Mapping[str, float | Fraction]
    last: Mapping[str, float | Fraction]


@dataclass(frozen=True)
class _IntegerSegment:
    """The demand over one segment as an integer polynomial.

    demand(start + m) * denominator = base + linear * m + quadratic * m * m, for each source.
    """

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
        segments: The segments from the run's start to its end or beyond. Shares are divided by their sum if it
            is not 1. Sources without a share in any segment are ignored.
    """

    def __init__(self, segments: Sequence[ShareSegment]) -> None:
        self.segments = list(segments)
        # Sorted, so that the order in which a YAML file lists its sources does not matter.
        named = {name for part in segments for name, share in [*part.first.items(), *part.last.items()] if share}
        self.names = sorted(named)
        self._integer_segments: list[_IntegerSegment] = []
        demand = [Fraction(0)] * len(self.names)
        start = 0
        for part in segments:
            first, last = self._fractions(part.first), self._fractions(part.last)
            if part.end is None or part.end > start:
                demand = self._append(start, part.end, first, last, demand)
                start = part.end or start
        if segments[-1].end is not None:
            last = self._fractions(segments[-1].last)
            self._append(start, None, last, last, demand)

    @classmethod
    def constant(cls, shares: Mapping[str, float]) -> Shares:
        return cls([ShareSegment(None, shares, shares)])

    @classmethod
    def of(cls, mixture: MixtureSection, num_sequences: int) -> Shares:
        """The shares of a mixture over a run of `num_sequences`. The ends of its phases are rounded to sequences."""
        return cls(
            [ShareSegment(round(end * num_sequences), first, last) for end, first, last in share_phases(mixture)]
        )

    @property
    def period(self) -> int | None:
        """Number of sequences after which every demand is an integer, within the first segment; None if it is a ramp."""
        segment = self._integer_segments[0]
        if any(segment.quadratic):
            return None
        return segment.denominator // math.gcd(segment.denominator, *segment.linear)

    @property
    def first_change(self) -> float:
        return self._integer_segments[0].end

    def demand(self, source: str, sequence: int) -> Fraction:
        """Number of sequences that a source should have given among the first `sequence`; 0 if it has no share."""
        if source not in self.names:
            return Fraction(0)
        index, segment = self.names.index(source), self._segment_at(sequence)
        return Fraction(segment.scaled_demand(index, sequence), segment.denominator)

    def planned(self, num_sequences: int) -> dict[str, int]:
        """Demands rounded to integers that sum to `num_sequences`.

        Differs from the schedule's counts by at most 1, but needs no schedule.
        """
        demand = {name: self.demand(name, num_sequences) for name in self.names}
        planned = {name: int(sequences) for name, sequences in demand.items()}
        missing = num_sequences - sum(planned.values())
        nearest = sorted(self.names, key=lambda name: planned[name] - demand[name])
        return planned | {name: planned[name] + 1 for name in nearest[:missing]}

    def reaches(self, source: int, numerator: int, denominator: int) -> float:
        """The first sequence n with demand(n) >= numerator / denominator; infinity if there is none."""
        return next(self.moments(source, numerator, denominator))

    def moments(self, source: int, numerator: int, denominator: int) -> Iterator[float]:
        """Yields `reaches` of a demand, of that demand + 1, + 2, and so on without end."""
        # The last segment has no end, and infinity is not beyond infinity: the generator never runs out.
        for segment in self._integer_segments:
            while True:
                # Demands are multiples of 1 / segment.denominator: round the wanted one up (-(-a // b)).
                wanted = -(-numerator * segment.denominator // denominator)
                found = _first_reaching(segment, source, wanted)
                if found > segment.end:
                    break
                yield found
                numerator += denominator

    def _segment_at(self, sequence: int) -> _IntegerSegment:
        return next(segment for segment in self._integer_segments if sequence <= segment.end)

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
        """Adds a segment from `start` to `end` (None: endless); returns the demand of each source at its end."""
        # A share that moves from a to b over L sequences is a + (b - a) * t / L after t of them. Its integral from 0
        # to m is a * m + (b - a) / (2 * L) * m², so the demand is a polynomial with the coefficients
        # (demand at the start, a, (b - a) / (2 * L)). In a constant segment the last one is 0.
        length = 1 if end is None else end - start
        bend = [(b - a) / (2 * length) if end is not None else Fraction(0) for a, b in zip(first, last, strict=True)]
        # One common denominator makes all coefficients integers, so evaluating and comparing demands is exact and fast.
        numbers = [*first, *bend, *demand]
        denominator = math.lcm(*(number.denominator for number in numbers))

        def scaled(values: list[Fraction]) -> tuple[int, ...]:
            return tuple(int(value * denominator) for value in values)

        segment = _IntegerSegment(
            start,
            math.inf if end is None else end,
            denominator,
            scaled(demand),
            scaled(first),
            scaled(bend),
        )
        self._integer_segments.append(segment)
        if end is None:
            return demand
        return [Fraction(segment.scaled_demand(source, end), denominator) for source in range(len(self.names))]


def _first_reaching(segment: _IntegerSegment, source: int, wanted: int) -> float:
    """The first sequence of a segment at which a source's scaled demand is at least `wanted`; infinity if none is.

    May return a sequence beyond the end of the segment; the caller discards it.
    """
    linear, quadratic = segment.linear[source], segment.quadratic[source]
    missing = wanted - segment.base[source]
    if missing <= 0:
        return segment.start
    if not quadratic:
        return segment.start + -(-missing // linear) if linear else math.inf
    # Solve quadratic * m² + linear * m = missing for the smaller positive m. Without a real solution, the share falls
    # to 0 before the demand is reached. isqrt rounds down and the division may round either way, so start a little
    # below the guess and step up to the exact integer.
    root = linear * linear + 4 * quadratic * missing
    if root < 0:
        return math.inf
    guess = (math.isqrt(root) - linear) // (2 * quadratic)
    m = max(guess - 2, 0)
    while (linear + quadratic * m) * m < missing:
        m += 1
        if segment.start + m > segment.end:
            return math.inf
    return segment.start + m
