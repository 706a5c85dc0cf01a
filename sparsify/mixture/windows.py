"""Windows: fixed-length pieces of a source's token stream, with positions and labels that respect its documents.

A source is an endless stream: all its training documents in an order of their own, then all of them again in
another order, and so on. Window j of the source is tokens [j * T, (j + 1) * T) of that stream, so every training
document is seen exactly once an epoch. Everything is a function of (seed, source, window): nothing is remembered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.errors import MixtureError
from sparsify.mixture.plan import SourceSchedule
from sparsify.mixture.tokens import TokenizedSource

NO_LOSS = -100
"""Label of a position without loss, as PyTorch's cross entropy ignores it."""

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """One packed window of T tokens. Labels are already shifted: do not shift them again.

    Args:
        source: Name of the source it is from.
        input_ids: [T] int64
        position_ids: Position within the document; 0 at the window's start as well. [T] int64
        labels: The token after each of `input_ids` in the same document; NO_LOSS where the document ends there
            or that token carries no loss. [T] int64
    """

    source: str
    input_ids: IntArray
    position_ids: IntArray
    labels: IntArray


class WindowReader:
    """Gives every window of a run by its number.

    Args:
        sources: The tokenised sources.
        shares: Token share of each of them.
        window_tokens: T, tokens of one window.
        seed: Decides the order of documents.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenizedSource],
        shares: Mapping[str, float],
        window_tokens: int,
        seed: int,
    ) -> None:
        self.window_tokens, self.seed = window_tokens, seed
        self.schedule = SourceSchedule(shares)
        self.sources = {name: sources[name] for name in shares}
        self._streams = {
            name: _TrainingStream(source, seed) for name, source in self.sources.items()
        }

    def window(self, index: int) -> Window:
        """The training window with this number, over the whole run and all processes."""
        name, rank = self.schedule.locate(index)
        start = rank * self.window_tokens
        pieces = self._streams[name].pieces(start, start + self.window_tokens)
        return pack(self.sources[name], pieces)

    def validation_windows(self, source: str, num_windows: int) -> list[Window]:
        """Windows of held-out documents, spread evenly over all of them.

        Returns:
            `num_windows` windows, or as many whole ones as there are.

        Raises:
            MixtureError: If the held-out documents do not fill one window.
        """
        return held_out_windows(self.sources[source], self.window_tokens, num_windows)


def collate(windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Stacks windows of one length into `input_ids`, `position_ids` and `labels`. [B, T] int64 each"""
    return {
        field: torch.from_numpy(np.stack([getattr(window, field) for window in windows]))
        for field in ("input_ids", "position_ids", "labels")
    }


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of one document, counted from the document's first token."""

    document: int
    start: int
    stop: int


def pack(source: TokenizedSource, pieces: Sequence[Piece]) -> Window:
    """Lays pieces of documents one after another into a window."""
    ids, positions, labels = zip(*(_read_piece(source, piece) for piece in pieces), strict=True)
    return Window(
        source.name, np.concatenate(ids), np.concatenate(positions), np.concatenate(labels)
    )


def _read_piece(source: TokenizedSource, piece: Piece) -> tuple[IntArray, IntArray, IntArray]:
    first = int(source.starts[piece.document])
    # One token more than the piece, where the document has it: the last position predicts it.
    stop = min(piece.stop + 1, int(source.lengths[piece.document]))
    tokens = source.tokens(first + piece.start, first + stop)
    carries_loss = source.loss_mask(first + piece.start, first + stop)
    num_tokens = piece.stop - piece.start
    labels = np.full(num_tokens, NO_LOSS, dtype=np.int64)
    labels[: len(tokens) - 1] = np.where(carries_loss[1:], tokens[1:], NO_LOSS)
    return tokens[:num_tokens], np.arange(num_tokens), labels


class DocumentOrder:
    """Documents laid one after another in a given order."""

    def __init__(self, documents: IntArray, lengths: IntArray) -> None:
        self.documents, self.lengths = documents, lengths
        self.ends = np.cumsum(lengths)

    def pieces(self, start: int, stop: int) -> Iterator[Piece]:
        """What tokens [start, stop) of this order are made of."""
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            length = int(self.lengths[place])
            begin = start - (int(self.ends[place]) - length)
            end = min(length, begin + stop - start)
            yield Piece(int(self.documents[place]), begin, end)
            start += end - begin
            place += 1


class _TrainingStream:
    """The endless stream of one source's training documents, epoch after epoch."""

    def __init__(self, source: TokenizedSource, seed: int) -> None:
        self.source, self.seed = source, seed
        self.documents = np.flatnonzero(~source.held_out)
        # Two epochs at a time are enough: a window may lie across the seam of one and the next.
        self.epoch_order = lru_cache(maxsize=2)(self._epoch_order)

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """What tokens [start, stop) of the stream are made of."""
        epoch_tokens = self.source.num_train_tokens
        pieces: list[Piece] = []
        while start < stop:
            epoch, offset = divmod(start, epoch_tokens)
            end = min(epoch_tokens, offset + stop - start)
            pieces += self.epoch_order(epoch).pieces(offset, end)
            start += end - offset
        return pieces

    def _epoch_order(self, epoch: int) -> DocumentOrder:
        key = f"{self.seed}/{self.source.name}/{epoch}".encode()
        digest = hashlib.blake2b(key, digest_size=32).digest()
        # RandomState, whose streams NumPy guarantees to stay as they are: a newer Generator may shuffle
        # differently, and a run resumed under it would see some documents twice and others never.
        shuffle = np.random.RandomState(np.frombuffer(digest, dtype="<u4"))
        documents = shuffle.permutation(self.documents)
        return DocumentOrder(documents, self.source.lengths[documents])


def held_out_windows(source: TokenizedSource, window_tokens: int, num_windows: int) -> list[Window]:
    """Whole windows of a source's held-out documents, spread evenly over all of them.

    Raises:
        MixtureError: If the held-out documents do not fill one window.
    """
    whole = source.num_validation_tokens // window_tokens
    if whole == 0:
        raise MixtureError(
            f"Source {source.name!r} holds out {source.num_validation_tokens} token(s), less than one window "
            f"of {window_tokens}.",
            next_step="Raise mixture.validation_fraction, add documents, or lower training.window_tokens.",
        )
    documents = np.flatnonzero(source.held_out)
    order = DocumentOrder(documents, source.lengths[documents])
    taken = min(num_windows, whole)
    starts = (number * whole // taken * window_tokens for number in range(taken))
    return [pack(source, list(order.pieces(start, start + window_tokens))) for start in starts]
