"""Packing: assigns the documents of a shard to sequences.

A document shorter than a sequence is never cut. A longer one is cut into whole sequences and a remainder. Remainders and
short documents are packed within their shard by best fit, longest first. The number of sequences depends only on the
lengths, not on the order of equally long pieces. So every epoch of a shard has the same number of sequences, and any
sequence of a run can be located without packing the shards before it.

Best-fit packing of training documents: Ding et al., "Fewer Truncations Improve Language Modeling", arXiv 2404.10830.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """The sequences of one shard, in the order in which they are drawn: P pieces of documents in S sequences.

    Attributes:
        document: Index of each piece's document. [P] int64
        start: Offset of each piece's first token in its document. [P] int64
        length: Tokens of each piece. [P] int64
        ends: One past the last piece of each sequence in the arrays above. [S] int64
    """

    document: IntArray
    start: IntArray
    length: IntArray
    ends: IntArray

    def pieces(self, sequence: int) -> slice:
        return slice(int(self.ends[sequence - 1]) if sequence else 0, int(self.ends[sequence]))


def count_sequences(lengths: IntArray, sequence_length: int) -> int:
    """Number of sequences into which documents of these lengths are packed, in any order."""
    rests = lengths % sequence_length
    rests = -np.sort(-rests[rests > 0])
    _, num_sequences = _best_fit(rests, sequence_length)
    return int((lengths // sequence_length).sum()) + num_sequences


def pack_documents(lengths: IntArray, sequence_length: int, shuffle: np.random.RandomState) -> Packing:
    """Packs all documents of a shard, of these lengths [D]; every token occurs exactly once. `shuffle` decides the
    order of equally long pieces, and of sequences.
    """
    # Pieces that fill a whole sequence need no packing; the remainders do.
    whole, rest = np.divmod(lengths, sequence_length)
    whole_document = np.repeat(np.arange(len(lengths)), whole)
    number_within = np.arange(len(whole_document)) - np.repeat(np.cumsum(whole) - whole, whole)
    # Longest first; a stable sort after a shuffle puts equally long pieces in random order.
    order = shuffle.permutation(np.flatnonzero(rest))
    order = order[np.argsort(-rest[order], kind="stable")]
    sequence_of_rest, num_packed = _best_fit(rest[order], sequence_length)

    document = np.concatenate([whole_document, order])
    start = np.concatenate([number_within, whole[order]]) * sequence_length
    length = np.concatenate([np.full(len(whole_document), sequence_length), rest[order]])
    sequence = np.concatenate([np.arange(len(whole_document)), len(whole_document) + sequence_of_rest])
    num_sequences = len(whole_document) + num_packed
    place = shuffle.permutation(num_sequences)[sequence]
    # Shuffle the pieces within each sequence too, because best fit puts the longest first.
    by_place = shuffle.permutation(len(place))
    by_place = by_place[np.argsort(place[by_place], kind="stable")]
    ends = np.cumsum(np.bincount(place, minlength=num_sequences))
    return Packing(document[by_place], start[by_place], length[by_place], ends)


def _best_fit(lengths: IntArray, sequence_length: int) -> tuple[IntArray, int]:
    """Puts each piece in the sequence where it leaves the least space. Lengths must be in descending order.

    Returns:
        The sequence of each piece [P], and the number of sequences.
    """
    sequences = np.empty(len(lengths), dtype=np.int64)
    # Open sequences by their free space, and the set of these spaces as one integer: bit s is set while some sequence
    # has s free tokens. Finding the best fit is then finding the lowest set bit at or above `length`.
    by_space: list[list[int]] = [[] for _ in range(sequence_length)]
    spaces = 0
    num_sequences = 0
    for place, length in enumerate(lengths.tolist()):
        fitting = spaces >> length  # drops the bits of all spaces that are too small
        if fitting:
            # x & -x isolates the lowest set bit; its bit_length is the bit's position plus 1.
            space = length + (fitting & -fitting).bit_length() - 1
            same = by_space[space]
            sequence = same.pop()
            if not same:  # this was the last sequence with this space: clear its bit
                spaces ^= 1 << space
        else:
            space, sequence = sequence_length, num_sequences
            num_sequences += 1
        sequences[place] = sequence
        if space > length:
            by_space[space - length].append(sequence)
            spaces |= 1 << (space - length)
    return sequences, num_sequences
