"""Packing: which pieces of a shard's documents share a sequence.

A document shorter than a sequence is never cut. A longer one gives whole sequences and a rest, and rests and short documents are
packed by best fit, longest first, within their shard. How many sequences that makes depends on the lengths alone, not on
the order among equal ones; so every epoch of a shard has the same number of sequences, and any sequence of a run can
be found without packing those before it.

Best-fit packing of training documents: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The sequences of one shard, in the order in which they are drawn.

    Attributes:
        document: Document of each piece. [P] int64
        start: First token of each piece, counted from its document's first. [P] int64
        length: Tokens of each piece. [P] int64
        ends: End of each sequence's pieces in the arrays above. [W] int64
    """

    document: IntArray
    start: IntArray
    length: IntArray
    ends: IntArray

    @property
    def num_sequences(self) -> int:
        return len(self.ends)

    def pieces(self, sequence: int) -> slice:
        """Where the pieces of one sequence are."""
        return slice(int(self.ends[sequence - 1]) if sequence else 0, int(self.ends[sequence]))


def count_sequences(lengths: IntArray, sequence_length: int) -> int:
    """Sequences that documents of these lengths make, in any order."""
    rests = lengths % sequence_length
    rests = -np.sort(-rests[rests > 0])
    _, num_sequences = _best_fit(rests, sequence_length)
    return int((lengths // sequence_length).sum()) + num_sequences


def pack_documents(
    lengths: IntArray, sequence_length: int, shuffle: np.random.RandomState
) -> Packing:
    """Packs all documents of a shard, every token of each exactly once.

    Args:
        lengths: Tokens of each document. [D] int64
        sequence_length: Tokens of a sequence.
        shuffle: Decides which of equally long pieces come first, and the order of sequences.
    """
    whole, rest = np.divmod(lengths, sequence_length)
    whole_document = np.repeat(np.arange(len(lengths)), whole)
    number_within = np.arange(len(whole_document)) - np.repeat(np.cumsum(whole) - whole, whole)
    order = shuffle.permutation(np.flatnonzero(rest))
    order = order[np.argsort(-rest[order], kind="stable")]
    sequence_of_rest, num_packed = _best_fit(rest[order], sequence_length)

    document = np.concatenate([whole_document, order])
    start = np.concatenate([number_within, whole[order]]) * sequence_length
    length = np.concatenate([np.full(len(whole_document), sequence_length), rest[order]])
    sequence = np.concatenate(
        [np.arange(len(whole_document)), len(whole_document) + sequence_of_rest]
    )
    num_sequences = len(whole_document) + num_packed
    place = shuffle.permutation(num_sequences)[sequence]
    # Within a sequence the pieces stand in a random order too: best fit lays the longest first.
    by_place = shuffle.permutation(len(place))
    by_place = by_place[np.argsort(place[by_place], kind="stable")]
    ends = np.cumsum(np.bincount(place, minlength=num_sequences))
    return Packing(document[by_place], start[by_place], length[by_place], ends)


def _best_fit(lengths: IntArray, sequence_length: int) -> tuple[IntArray, int]:
    """Puts each piece, longest first, where it leaves the least space.

    Returns:
        The sequence of each piece, and how many sequences there are.
    """
    sequences = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(sequence_length)]
    spaces = 0  # bit s is set while some sequence has s tokens of space
    num_sequences = 0
    for place, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            same = by_space[space]
            sequence = same.pop()
            if not same:
                spaces ^= 1 << space
        else:
            space, sequence = sequence_length, num_sequences
            num_sequences += 1
        sequences[place] = sequence
        if space > length:
            by_space[space - length].append(sequence)
            spaces |= 1 << (space - length)
    return sequences, num_sequences
