"""Epoch caps: what becomes of a run in which a source may not be seen as often as its share asks.

A cap is a capacity: the most sequences that a source may give. An exhausted source either hands its share to the others, or the
run is refused, with the budget that fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from sparsify.mixture.sequences.shares import Shares, Stretch, exact_shares
from sparsify.recipe.mixture import MixtureSection


def capped_shares(
    mixture: MixtureSection, num_sequences: int, capacities: Mapping[str, int]
) -> Shares:
    """The shares of a run, with what sources of `when_exhausted: redistribute` cannot give handed to the others."""
    handing_on = {
        name: capacity
        for name, capacity in capacities.items()
        if mixture.sources[name].when_exhausted == "redistribute"
    }
    return redistributed(Shares.of(mixture, num_sequences), handing_on)


def first_exceeded(
    mixture: MixtureSection, num_sequences: int, capacities: Mapping[str, int]
) -> str | None:
    """The source that a run would ask for more than its capacity first; None if the run fits."""
    shares = capped_shares(mixture, num_sequences, capacities)
    fits = {name: last_sequence_within(shares, name, size) for name, size in capacities.items()}
    name = min(fits, key=lambda one: (fits[one], one), default=None)
    return None if name is None or fits[name] >= num_sequences else name


def fitting_steps(
    mixture: MixtureSection, num_steps: int, global_batch_size: int, capacities: Mapping[str, int]
) -> int:
    """The most steps, up to `num_steps`, of a run that exceeds no capacity; 0 if none fits.

    A shorter run is planned anew: its phases end earlier, so it does not just stop where the longer one would break a cap.
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
    """Most sequences that a run can ask of each source, whatever is exhausted on the way; at least one.

    A source without a share counts too: what the others do to it is measured on its held-out text.
    """
    stated = Shares.of(mixture, num_sequences)
    handing_on = {
        name: 0
        for name, source in mixture.sources.items()
        if source.when_exhausted == "redistribute"
    }
    most = {}
    for name in mixture.sources:
        others = {other: size for other, size in handing_on.items() if other != name}
        demand = redistributed(stated, others).demand(name, num_sequences)
        most[name] = math.ceil(demand) + 1  # the schedule is never a whole sequence ahead
    return most


def last_sequence_within(shares: Shares, name: str, capacity: int) -> float:
    """How many sequences a run may have before a source could be asked for more than `capacity` of them."""
    if name not in shares.names:
        return math.inf
    slack = max(2 * len(shares.names) - 2, 1)
    # PackedSequence number `capacity`, counted from 0, is not given before the demand is that and 1 / slack.
    released = shares.reaches(shares.names.index(name), slack * capacity + 1, slack)
    return released - 1


def redistributed(shares: Shares, capacities: Mapping[str, int]) -> Shares:
    """The shares of a run in which sources stop giving when they are exhausted, and the others give more.

    From where a source is exhausted, its share goes to the others in proportion to theirs; in a ramp at both its ends, with a
    straight line between them. Where there are no others it keeps its share, and `last_sequence_within` says how
    long that can last.

    Args:
        shares: The shares before.
        capacities: Most sequences that a source may give.
    """
    waiting = set(capacities) & set(shares.names)
    while waiting:
        ends = {name: last_sequence_within(shares, name, capacities[name]) for name in waiting}
        name = min(ends, key=lambda one: (ends[one], one))
        if ends[name] == math.inf:
            break
        shares = Shares(_without(shares.stretches, name, int(ends[name])))
        waiting.remove(name)
        waiting &= set(shares.names)
    return shares


def _without(stretches: Sequence[Stretch], name: str, sequence: int) -> list[Stretch]:
    """The stretches, with a source's share given to the others from a sequence on."""
    end = stretches[-1].end
    endless = [] if end is None else [Stretch(None, stretches[-1].last, stretches[-1].last)]
    changed: list[Stretch] = []
    start = 0
    for part in [*stretches, *endless]:
        if part.end is not None and part.end <= sequence:
            changed.append(part)
        else:
            first, last = exact_shares(part.first), exact_shares(part.last)
            if start < sequence:
                middle = _on_the_way(first, last, sequence - start, part.end and part.end - start)
                changed.append(Stretch(sequence, first, middle))
                first = middle
            changed.append(Stretch(part.end, *_handed_on(first, last, name)))
        start = part.end or start
    return changed


def _on_the_way(
    first: dict[str, Fraction], last: dict[str, Fraction], sequence: int, length: int | None
) -> dict[str, Fraction]:
    """Shares at a sequence of a stretch that is `length` sequences long."""
    if length is None:
        return first
    names = first.keys() | last.keys()
    way = Fraction(sequence, length)
    return {
        name: (1 - way) * first.get(name, Fraction(0)) + way * last.get(name, Fraction(0))
        for name in names
    }


def _handed_on(
    first: dict[str, Fraction], last: dict[str, Fraction], name: str
) -> tuple[dict[str, Fraction], dict[str, Fraction]]:
    """Shares at both ends of a stretch without one source."""
    ends = [
        {other: share for other, share in end.items() if other != name} for end in (first, last)
    ]
    # Where others have a share at one end only, they have it in the same proportion all the way.
    kept = [end for end in ends if any(end.values())]
    if not kept:
        return first, last
    return exact_shares(kept[0]), exact_shares(kept[-1])
