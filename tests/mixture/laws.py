"""The bound that every schedule satisfies, and random shares to test it with."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import strategies as st

from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import Shares, ShareSegment


def weighted(parts: list[int]) -> dict[str, float]:
    return {f"source{i}": part / sum(parts) for i, part in enumerate(parts)}


def share_at(shares: Shares, source: str, sequence: int) -> float:
    return float(shares.demand(source, sequence + 1) - shares.demand(source, sequence))


@st.composite
def curves(draw: st.DrawFn) -> Shares:
    """Up to five segments of constant or changing shares; sources may start and stop."""
    num_sources = draw(st.integers(1, 12))
    part = st.integers(0, 1000)
    row = st.lists(part, min_size=num_sources, max_size=num_sources).filter(any)
    end, segments = 0, []
    for _ in range(draw(st.integers(1, 5))):
        end += draw(st.integers(1, 120))
        first = weighted(draw(row))
        last = weighted(draw(row)) if draw(st.booleans()) else first
        segments.append(ShareSegment(end, first, last))
    return Shares(segments)


def assert_law(schedule: SourceSchedule, num_sequences: int) -> None:
    """Sequences come in order, without repetition, and less than one away from their demand."""
    shares, names = schedule.shares, schedule.names
    bound = 1 - Fraction(1, max(2 * len(names) - 2, 1))
    given_sequences = dict.fromkeys(names, 0)
    for count, (name, rank) in enumerate(schedule.sequences_of(0, num_sequences), start=1):
        assert rank == given_sequences[name]
        given_sequences[name] += 1
        for source, sequences in given_sequences.items():
            assert abs(sequences - shares.demand(source, count)) <= bound
