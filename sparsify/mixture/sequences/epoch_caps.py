"""Epoch caps: limits how many sequences a source may give over a run (its capacity).

The share of an exhausted source is redistributed to the others, or the run is refused with the largest budget that
fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from sparsify.mixture.sequences.shares import Shares, ShareSegment, exact_shares
from sparsify.recipe.mixture import MixtureSection


def capped_shares(mixture: MixtureSection, num_sequences: int, capacities: Mapping[str, int]) -> Shares:
    """The shares of a run, after sources with `when_exhausted: redistribute` have passed on what they cannot give."""
    redistributing = {
        name: capacity
        for name, capacity in capacities.items()
        if mixture.sources[name].when_exhausted == "redistribute"
    }
    return redistributed(Shares.of(mixture, num_sequences), redistributing)


def first_exceeded(mixture: MixtureSection, num_sequences: int, capacities: Mapping[str, int]) -> str | None:
    """The source whose capacity a run exceeds first; None if the run fits."""
    shares = capped_shares(mixture, num_sequences, capacities)
    fits = {name: last_sequence_within(shares, name, size) for name, size in capacities.items()}
    name = min(fits, key=lambda one: (fits[one], one), default=None)
    return None if name is None or fits[name] >= num_sequences else name


def fitting_steps(
    mixture: MixtureSection, num_steps: int, global_batch_size: int, capacities: Mapping[str, int]
) -> int:
    """The largest number of steps, up to `num_steps`, with which no capacity is exceeded; 0 if none fits.

    A binary search, because a shorter run is not a prefix of the longer one: its phases end earlier.
    """
    fitting, too_many = 0, num_steps + 1
    while too_many - fitting > 1:
        steps = (fitting + too_many) // 2
        if first_exceeded(mixture, steps * global_batch_size, capacities) is None:
            fitting = steps
        else:
            too_many = steps
    return fitting


def most_sequences(mixture: MixtureSection, num_sequences: int) -> dict[str, int]:
    """Upper bound of the sequences that a run takes from each source, whichever others are exhausted; at least one.

    Includes sources with share 0: they are validated on their held-out text.
    """
    stated = Shares.of(mixture, num_sequences)
    redistributing = {name: 0 for name, source in mixture.sources.items() if source.when_exhausted == "redistribute"}
    most = {}
    for name in mixture.sources:
        others = {other: size for other, size in redistributing.items() if other != name}
        demand = redistributed(stated, others).demand(name, num_sequences)
        most[name] = math.ceil(demand) + 1  # the schedule is never a whole sequence ahead
    return most


def last_sequence_within(shares: Shares, name: str, capacity: int) -> float:
    """Length in sequences up to which a run takes at most `capacity` sequences from a source."""
    if name not in shares.names:
        return math.inf
    slack = max(2 * len(shares.names) - 2, 1)
    # The schedule does not release the source's sequence number `capacity` (counted from 0) before its demand reaches
    # capacity + 1 / slack; see `schedule._FairOrder`.
    released = shares.reaches(shares.names.index(name), slack * capacity + 1, slack)
    return released - 1


def redistributed(shares: Shares, capacities: Mapping[str, int]) -> Shares:
    """The shares of a run in which each source stops when its capacity is exhausted, and the others take its share.

    From that sequence on, the others take the share in proportion to theirs; in a ramp, at both ends of it, with a
    straight line between. If there are no others, the source keeps its share, and `last_sequence_within` says how long
    that can last.
    """
    remaining = set(capacities) & set(shares.names)
    while remaining:
        # The source that is exhausted first. Its share makes the others end earlier, so their ends are recomputed.
        ends = {name: last_sequence_within(shares, name, capacities[name]) for name in remaining}
        name = min(ends, key=lambda one: (ends[one], one))
        if ends[name] == math.inf:
            break
        shares = Shares(_without(shares.segments, name, int(ends[name])))
        remaining.remove(name)
        remaining &= set(shares.names)
    return shares


def _without(segments: Sequence[ShareSegment], name: str, sequence: int) -> list[ShareSegment]:
    """The segments with a source's share given to the others from `sequence` on."""
    end = segments[-1].end
    endless = [] if end is None else [ShareSegment(None, segments[-1].last, segments[-1].last)]
    changed: list[ShareSegment] = []
    start = 0
    for part in [*segments, *endless]:
        if part.end is not None and part.end <= sequence:
            changed.append(part)
        else:
            first, last = exact_shares(part.first), exact_shares(part.last)
            if start < sequence:
                # The source is exhausted inside this segment: split it.
                middle = _interpolated(first, last, sequence - start, part.end and part.end - start)
                changed.append(ShareSegment(sequence, first, middle))
                first = middle
            changed.append(ShareSegment(part.end, *_without_source(first, last, name)))
        start = part.end or start
    return changed


def _interpolated(
    first: dict[str, Fraction], last: dict[str, Fraction], sequence: int, length: int | None
) -> dict[str, Fraction]:
    """Shares after `sequence` of the `length` sequences of a segment; None is an endless, constant segment."""
    if length is None:
        return first
    names = first.keys() | last.keys()
    weight = Fraction(sequence, length)
    return {name: (1 - weight) * first.get(name, Fraction(0)) + weight * last.get(name, Fraction(0)) for name in names}


def _without_source(
    first: dict[str, Fraction], last: dict[str, Fraction], name: str
) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    ends = [{other: share for other, share in end.items() if other != name} for end in (first, last)]
    # If the others have a share at one end only, use its proportions at both ends.
    kept = [end for end in ends if any(end.values())]
    if not kept:
        return first, last
    return exact_shares(kept[0]), exact_shares(kept[-1])
