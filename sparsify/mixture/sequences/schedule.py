"""Which source gives which sequence: exact token shares at every moment of a run, without any state.

All sequences hold the same number of tokens, so shares of tokens are shares of sequences. Drawing sources at random
would keep them on average only; over a run's last checkpoint, a short sweep or a rare source that is not enough.
Instead sequences are handed out as fairly as integers allow: after n sequences, each source has given less than one
sequence more or less than its demand. Because source and position follow from the sequence's number alone, resuming takes one
integer, and neither the number of processes nor the order of reading changes anything.
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
"""Every so many chunks it is remembered what was given: earlier sequences are found again from there."""


@dataclass(frozen=True)
class Anchor:
    """How many sequences each source has given among the first `sequence`. A shortcut: every anchor follows from the shares."""

    sequence: int
    given: Mapping[str, int]


class SourceSchedule:
    """Maps a global sequence index to a source and the index of the sequence within that source.

    This is Tijdeman's solution of the chairman assignment problem: k unions share a yearly chair in proportion to their
    sizes, which may change over the years. Every sequence of a source has a first moment at which it may be given,
    and a deadline; the most urgent one is given. For k sources with demands D_i(n), the sequences x_i(n) of source i
    among the first n satisfy

        |x_i(n) - D_i(n)| <= 1 - 1 / (2k - 2) < 1,

    a bound that no schedule can lower for all shares. Computed in exact integers.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980), 323-330.

    Args:
        shares: Demand of each source over the run.
        anchor: Where to begin instead of at the first sequence; changes nothing but the time that it takes. One that cannot
            be of these shares, because they were changed since, is not used.
    """

    def __init__(self, shares: Shares, anchor: Anchor | None = None) -> None:
        self.shares, self.names = shares, shares.names
        self._anchors: dict[int, list[int]] = {0: [0] * len(self.names)}
        if anchor is not None and _is_possible(anchor, shares):
            self._anchors[anchor.sequence] = [anchor.given[name] for name in self.names]
        self._chunks: deque[_Chunk] = deque(maxlen=OPEN_CHUNKS)
        self._order: _FairOrder | None = None  # at the end of the newest chunk, to go on from

    def locate(self, sequence: int) -> tuple[str, int]:
        """Source of a global sequence, and the sequence's index within that source."""
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
        """What each source has given among the first `sequence` sequences."""
        order = self._order_before(sequence)
        while order.sequence < sequence:
            order.next_sequences(min(sequence - order.sequence, CHUNK_SEQUENCES))
        return Anchor(sequence, dict(zip(self.names, order.given, strict=True)))

    def counts(self, num_sequences: int) -> dict[str, int]:
        """Sequences that each source gives among the first `num_sequences`."""
        return dict(self.anchor(num_sequences).given)

    def _chunk_of(self, sequence: int) -> _Chunk:
        for chunk in self._chunks:
            if chunk.holds(sequence):
                return chunk
        return self._new_chunk(sequence)

    def _new_chunk(self, sequence: int) -> _Chunk:
        """Hands out sequences up to and beyond this one, from the nearest place that is known."""
        order = self._order
        if order is None or not order.sequence <= sequence < order.sequence + CHUNK_SEQUENCES:
            order = self._order_before(sequence)
        while True:
            start = order.sequence
            # Up to the next multiple, so that chunks that began anywhere soon end at the same places.
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
        """The order at the latest sequence up to this one at which it is known what was given."""
        start = max(known for known in self._anchors if known <= sequence)
        given = self._anchors[start]
        period = self.shares.period
        if period is not None:
            # Where every demand is whole, the bound leaves no other choice than to have given just that.
            whole = int(min(sequence, self.shares.first_change)) // period * period
            if whole > start:
                start, given = whole, [int(self.shares.demand(name, whole)) for name in self.names]
        return _FairOrder(self.shares, start, given)


def _is_possible(anchor: Anchor, shares: Shares) -> bool:
    return (
        anchor.given.keys() == set(shares.names)
        and sum(anchor.given.values()) == anchor.sequence
        and all(
            abs(count - shares.demand(name, anchor.sequence)) < 1
            for name, count in anchor.given.items()
        )
    )


@dataclass(frozen=True)
class _Chunk:
    """Consecutive sequences: source of each, and its index within the source."""

    start: int
    sources: list[int]
    ranks: list[int]

    def holds(self, sequence: int) -> bool:
        return self.start <= sequence < self.start + len(self.sources)


class _FairOrder:
    """Hands out sequences one by one, by earliest deadline among those that may be given.

    With c = 2k - 2, Tijdeman gives sequence x (from 0) of a source not before the first n at which its demand is x + 1 / c;
    its deadline is the first n at which it is x + 1 - 1 / c.
    """

    def __init__(self, shares: Shares, sequence: int, given: Sequence[int]) -> None:
        self.sequence, self.given = sequence, list(given)
        slack = max(2 * len(self.given) - 2, 1)
        numbered = list(enumerate(self.given))
        self._releases = [shares.moments(i, slack * x + 1, slack) for i, x in numbered]
        self._deadlines = [shares.moments(i, slack * x + slack - 1, slack) for i, x in numbered]
        # The next sequence of each source is in one of two heaps: release, source; and deadline, source.
        self._waiting = [(next(releases), i) for i, releases in enumerate(self._releases)]
        self._ready: list[tuple[float, int]] = []
        heapify(self._waiting)

    def next_sequences(self, count: int) -> tuple[list[int], list[int]]:
        """Source and index within the source of the next `count` sequences."""
        sources: list[int] = []
        ranks: list[int] = []
        waiting, ready, given = self._waiting, self._ready, self.given
        releases, deadlines = self._releases, self._deadlines
        for sequence in range(self.sequence + 1, self.sequence + count + 1):
            while waiting[0][0] <= sequence:
                source = heappop(waiting)[1]
                heappush(ready, (next(deadlines[source]), source))
                if not waiting:
                    break
            source = heappop(ready)[1]
            sources.append(source)
            ranks.append(given[source])
            given[source] += 1
            heappush(waiting, (next(releases[source]), source))
        self.sequence += count
        return sources, ranks
