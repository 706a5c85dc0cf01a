"""Schedule: maps the number of a sequence to its source, with exact token shares at every moment and without state.

All sequences hold the same number of tokens, so shares of tokens are shares of sequences. Drawing sources at random
would meet the shares on average only, which is not enough for the last checkpoint of a run, a short sweep or a rare
source. Here, after any number n of sequences, each source has given less than one sequence more or less than its demand.
Source and position follow from the number of the sequence alone. So resuming takes one integer, and neither the number
of ranks nor the order of reading changes the data.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from sparsify.mixture.sequences.shares import Shares

CHUNK_SEQUENCES = 1 << 12
OPEN_CHUNKS = 4
ANCHOR_CHUNKS = 64
"""Chunks between two stored anchors, from which earlier sequences are recomputed."""


@dataclass(frozen=True)
class Anchor:
    """Sequences that each source has given among the first `sequence`.

    A cache to save time: an anchor can always be recomputed from the shares.
    """

    sequence: int
    given: Mapping[str, int]


class SourceSchedule:
    """Maps a global sequence index to a source and the index of the sequence within that source.

    This is Tijdeman's solution of the chairman assignment problem: k states take turns in appointing the chairman of
    their union, in proportion to their sizes, which may change over time. Each sequence of a source has a release time
    and a deadline; of the released ones, that with the earliest deadline comes next. For k sources with demands D_i(n),
    the number x_i(n) of sequences of source i among the first n satisfies

        |x_i(n) - D_i(n)| <= 1 - 1 / (2k - 2) < 1,

    a bound that no schedule can improve for all shares. Computed in exact integers.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), 323-330.

    Args:
        shares: Demand of each source over the run.
        anchor: Where to start instead of at sequence 0, which only saves time. Ignored if it is inconsistent with the
            shares, e.g. because they have changed.
    """

    def __init__(self, shares: Shares, anchor: Anchor | None = None) -> None:
        self.shares, self.names = shares, shares.names
        self._anchors: dict[int, list[int]] = {0: [0] * len(self.names)}
        if anchor is not None and _is_possible(anchor, shares):
            self._anchors[anchor.sequence] = [anchor.given[name] for name in self.names]
        self._chunks: deque[_Chunk] = deque(maxlen=OPEN_CHUNKS)
        self._order: _FairOrder | None = None  # state at the end of the newest chunk

    def locate(self, sequence: int) -> tuple[str, int]:
        """Source of a global sequence index, and the index of the sequence within that source."""
        chunk = self._chunk_of(sequence)
        place = sequence - chunk.start
        return self.names[chunk.sources[place]], chunk.ranks[place]

    def sequences_of(self, start: int, count: int) -> list[tuple[str, int]]:
        """`locate` of the global sequences start, …, start + count - 1."""
        found: list[tuple[str, int]] = []
        while len(found) < count:
            chunk = self._chunk_of(start + len(found))
            first = start + len(found) - chunk.start
            last = first + count - len(found)
            names = (self.names[source] for source in chunk.sources[first:last])
            found += zip(names, chunk.ranks[first:last], strict=True)
        return found

    def anchor(self, sequence: int) -> Anchor:
        order = self._order_before(sequence)
        while order.sequence < sequence:
            order.next_sequences(min(sequence - order.sequence, CHUNK_SEQUENCES))
        return Anchor(sequence, dict(zip(self.names, order.given, strict=True)))

    def counts(self, num_sequences: int) -> dict[str, int]:
        return dict(self.anchor(num_sequences).given)

    def _chunk_of(self, sequence: int) -> _Chunk:
        for chunk in self._chunks:
            if chunk.holds(sequence):
                return chunk
        return self._new_chunk(sequence)

    def _new_chunk(self, sequence: int) -> _Chunk:
        """Computes the chunk that holds this sequence, from the nearest known state."""
        order = self._order
        if order is None or not order.sequence <= sequence < order.sequence + CHUNK_SEQUENCES:
            order = self._order_before(sequence)
        while True:
            start = order.sequence
            # End at a multiple of CHUNK_SEQUENCES, so that chunks align whatever the first start was.
            count = CHUNK_SEQUENCES - start % CHUNK_SEQUENCES
            sources, ranks = order.next_sequences(count)
            if order.sequence % (ANCHOR_CHUNKS * CHUNK_SEQUENCES) == 0:
                self._anchors[order.sequence] = list(order.given)
            if order.sequence > sequence:
                break
        chunk = _Chunk(start, sources, ranks)
        self._chunks.appendleft(chunk)
        self._order = order
        return chunk

    def _order_before(self, sequence: int) -> _FairOrder:
        """The state at the latest sequence up to this one for which the counts are known."""
        start = max(known for known in self._anchors if known <= sequence)
        given = self._anchors[start]
        period = self.shares.period
        if period is not None:
            # At a multiple of the period every demand is an integer. The counts differ from the demands by less than 1,
            # so they are equal to them.
            whole = int(min(sequence, self.shares.first_change)) // period * period
            if whole > start:
                start, given = whole, [int(self.shares.demand(name, whole)) for name in self.names]
        return _FairOrder(self.shares, start, given)


def _is_possible(anchor: Anchor, shares: Shares) -> bool:
    return (
        anchor.given.keys() == set(shares.names)
        and sum(anchor.given.values()) == anchor.sequence
        and all(abs(count - shares.demand(name, anchor.sequence)) < 1 for name, count in anchor.given.items())
    )


@dataclass(frozen=True)
class _Chunk:
    """Consecutive sequences: the source of each, and its index within the source."""

    start: int
    sources: list[int]
    ranks: list[int]

    def holds(self, sequence: int) -> bool:
        return self.start <= sequence < self.start + len(self.sources)


class _FairOrder:
    """Generates the schedule in order: earliest deadline first among the released sequences.

    With c = 2k - 2 for k sources, sequence x (from 0) of a source is released at the first n at which the source's
    demand reaches x + 1 / c; its deadline is the first n at which the demand reaches x + 1 - 1 / c. Tijdeman proves
    that with these times no deadline is ever missed and some sequence is always released, which gives the bound.
    """

    def __init__(self, shares: Shares, sequence: int, given: Sequence[int]) -> None:
        self.sequence, self.given = sequence, list(given)
        slack = max(2 * len(self.given) - 2, 1)  # c; with one source, release and deadline coincide at x + 1
        # `moments` yields the times at which the demand reaches numerator / slack, that + 1, that + 2, …: the release
        # times (x + 1 / c) and deadlines (x + 1 - 1 / c) of the source's sequences x, x + 1, x + 2, …
        numbered = list(enumerate(self.given))
        self._releases = [shares.moments(i, slack * x + 1, slack) for i, x in numbered]
        self._deadlines = [shares.moments(i, slack * x + slack - 1, slack) for i, x in numbered]
        # The next sequence of each source is in exactly one of two heaps: in `_waiting` as (release, source) until it
        # is released, then in `_ready` as (deadline, source). Ties are broken by source, so the order is unique.
        self._waiting = [(next(releases), i) for i, releases in enumerate(self._releases)]
        self._ready: list[tuple[float, int]] = []
        heapify(self._waiting)

    def next_sequences(self, count: int) -> tuple[list[int], list[int]]:
        sources: list[int] = []
        ranks: list[int] = []
        waiting, ready, given = self._waiting, self._ready, self.given
        releases, deadlines = self._releases, self._deadlines
        for sequence in range(self.sequence + 1, self.sequence + count + 1):
            # Move what is released by now. Sequences count from 1 here: n is the number given including this one.
            while waiting[0][0] <= sequence:
                source = heappop(waiting)[1]
                heappush(ready, (next(deadlines[source]), source))
                if not waiting:
                    break
            source = heappop(ready)[1]  # the earliest deadline
            sources.append(source)
            ranks.append(given[source])
            given[source] += 1
            heappush(waiting, (next(releases[source]), source))
        self.sequence += count
        return sources, ranks
