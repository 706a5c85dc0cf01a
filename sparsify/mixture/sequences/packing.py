"""Packing: which pieces of a shard's documents share a window.

A document shorter than a window is never cut. A longer one gives whole windows and a rest, and rests and short documents are
packed by best fit, longest first, within their shard. How many windows that makes depends on the lengths alone, not on
the order among equal ones; so every epoch of a shard has the same number of windows, and any window of a run can
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
    """The windows of one shard, in the order in which they are drawn.

    Attributes:
        document: Document of each piece. [P] int64
        start: First token of each piece, counted from its document's first. [P] int64
        length: Tokens of each piece. [P] int64
        ends: End of each window's pieces in the arrays above. [W] int64
    """

    document: IntArray
    start: IntArray
    length: IntArray
    ends: IntArray

    @property
    def num_windows(self) -> int:
        return len(self.ends)

    def pieces(self, window: int) -> slice:
        """Where the pieces of one window are."""
        return slice(int(self.ends[window - 1]) if window else 0, int(self.ends[window]))


def count_windows(lengths: IntArray, window_tokens: int) -> int:
    """Windows that documents of these lengths make, in any order."""
    rests = lengths % window_tokens
    rests = -np.sort(-rests[rests > 0])
    _, num_windows = _best_fit(rests, window_tokens)
    return int((lengths // window_tokens).sum()) + num_windows


def pack_documents(
    lengths: IntArray, window_tokens: int, shuffle: np.random.RandomState
) -> Packing:
    """Packs all documents of a shard, every token of each exactly once.

    Args:
        lengths: Tokens of each document. [D] int64
        window_tokens: Tokens of a window.
        shuffle: Decides which of equally long pieces come first, and the order of windows.
    """
    whole, rest = np.divmod(lengths, window_tokens)
    whole_document = np.repeat(np.arange(len(lengths)), whole)
    number_within = np.arange(len(whole_document)) - np.repeat(np.cumsum(whole) - whole, whole)
    order = shuffle.permutation(np.flatnonzero(rest))
    order = order[np.argsort(-rest[order], kind="stable")]
    window_of_rest, num_packed = _best_fit(rest[order], window_tokens)

    document = np.concatenate([whole_document, order])
    start = np.concatenate([number_within, whole[order]]) * window_tokens
    length = np.concatenate([np.full(len(whole_document), window_tokens), rest[order]])
    window = np.concatenate([np.arange(len(whole_document)), len(whole_document) + window_of_rest])
    num_windows = len(whole_document) + num_packed
    place = shuffle.permutation(num_windows)[window]
    # Within a window the pieces stand in a random order too: best fit lays the longest first.
    by_place = shuffle.permutation(len(place))
    by_place = by_place[np.argsort(place[by_place], kind="stable")]
    ends = np.cumsum(np.bincount(place, minlength=num_windows))
    return Packing(document[by_place], start[by_place], length[by_place], ends)


def _best_fit(lengths: IntArray, window_tokens: int) -> tuple[IntArray, int]:
    """Puts each piece, longest first, where it leaves the least space.

    Returns:
        The window of each piece, and how many windows there are.
    """
    windows = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(window_tokens)]
    spaces = 0  # bit s is set while some window has s tokens of space
    num_windows = 0
    for place, length in enumerate(lengths.tolist()):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            same = by_space[space]
            window = same.pop()
            if not same:
                spaces ^= 1 << space
        else:
            space, window = window_tokens, num_windows
            num_windows += 1
        windows[place] = window
        if space > length:
            by_space[space - length].append(window)
            spaces |= 1 << (space - length)
    return windows, num_windows
