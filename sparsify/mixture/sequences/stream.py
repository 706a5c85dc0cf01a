"""The endless stream of one source's training sequences, epoch after epoch, with random access.

The first epoch reads the shards in the order in which they were tokenised, so that it can start before the last shard
exists; later epochs shuffle the shards. Within a shard, documents are packed and sequences shuffled with a new order in
each epoch. Every document occurs exactly once per epoch. A run whose budget was extended packs what the earlier budget reached of
a shard by itself, as it did before, and then the rest of the shard.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sparsify.files import storage_errors
from sparsify.mixture.sequences.packing import Packing, count_sequences, pack_documents
from sparsify.mixture.tokens.tokenized_source import ShardDocuments, TokenizedSource

OPEN_PACKINGS = 2
"""A batch may span two shards."""

IntArray = NDArray[np.int64]


class TrainingStream:
    """Sequences of one source.

    Args:
        source: The tokenised source, which may still grow.
    """

    def __init__(self, source: TokenizedSource, sequence_length: int, seed: int) -> None:
        self.source, self.sequence_length, self.seed = source, sequence_length, seed
        self._pieces = source.pieces()
        self._counts = self._stored_counts()[: len(self._pieces)]
        self._train_ready = False
        self.packed = lru_cache(maxsize=OPEN_PACKINGS)(self._packed)
        self._epoch = lru_cache(maxsize=OPEN_PACKINGS)(self._order_of_epoch)
        self._count()

    @property
    def num_sequences(self) -> int:
        """Sequences of one epoch; until the source is `train_ready`, those available so far."""
        return int(self._counts.sum())

    def is_available(self, rank: int) -> bool:
        """Whether a sequence can be read now. Looks for new shards if not."""
        if not self._train_ready and rank >= self.num_sequences:
            self.source.refresh()
            self._count()
        return self._train_ready or rank < self.num_sequences

    def locate(self, rank: int) -> tuple[int, int, int]:
        """Epoch, shard, and index within the shard of the stream's sequence number `rank`."""
        # Until the source is `train_ready` the length of an epoch is unknown, and the first epoch is not over.
        epoch, rest = divmod(rank, self.num_sequences) if self._train_ready else (0, rank)
        order, ends = self._epoch(epoch, len(self._counts))
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch, int(order[place]), rest - (int(ends[place - 1]) if place else 0)

    def _count(self) -> None:
        known, self._train_ready = len(self._counts), self.source.train_ready
        self._pieces = self.source.pieces()
        new = [
            count_sequences(self.source.piece_documents(self._pieces, place).lengths, self.sequence_length)
            for place in range(known, len(self._pieces))
        ]
        self._counts = np.array([*self._counts, *new], dtype=np.int64)
        if new:
            self._store_counts()

    def _order_of_epoch(self, epoch: int, num_pieces: int) -> tuple[IntArray, IntArray]:
        order = np.arange(num_pieces)
        if epoch:
            order = self._shuffle(epoch).permutation(order)
        return order, np.cumsum(self._counts[order])

    def _packed(self, epoch: int, place: int) -> tuple[ShardDocuments, Packing]:
        documents = self.source.piece_documents(self._pieces, place)
        shuffle = self._shuffle(epoch, place)
        return documents, pack_documents(documents.lengths, self.sequence_length, shuffle)

    def _shuffle(self, *place: int) -> np.random.RandomState:
        key = "/".join(map(str, (self.seed, self.source.name, *place))).encode()
        digest = hashlib.blake2b(key, digest_size=32).digest()
        # NumPy guarantees that RandomState's streams never change. A newer Generator may shuffle differently, and a
        # run resumed under it would see some documents twice and others never.
        return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))

    @property
    def _counts_path(self) -> Path:
        earlier = "".join(f"-{tokens}" for tokens in sorted(self.source.need.earlier_train_tokens))
        return self.source.cache.folder / f"sequences-{self.sequence_length}{earlier}.npy"

    def _stored_counts(self) -> IntArray:
        """Numbers of sequences of the first shards, stored by an earlier run, so that late resumes are fast."""
        try:
            stored = np.load(self._counts_path)
            counts = stored[:-1]
            if stored[-1] != hash_of_counts(counts):
                raise ValueError("damaged")
        except (OSError, ValueError, EOFError, IndexError):  # then they are counted again
            return np.empty(0, dtype=np.int64)
        whole = sum(self.source.is_final(number) for number, _ in self._pieces[: len(counts)])
        return counts[:whole]

    def _store_counts(self) -> None:
        whole = sum(self.source.is_final(number) for number, _ in self._pieces[: len(self._counts)])
        if whole <= len(self._stored_counts()):
            return
        partial = self._counts_path.with_suffix(f".partial-{np.random.SeedSequence().entropy:x}")
        with storage_errors(self._counts_path):
            try:
                with partial.open("wb") as file:
                    counts = self._counts[:whole]
                    np.save(file, np.append(counts, hash_of_counts(counts)))
                partial.replace(self._counts_path)
            finally:
                partial.unlink(missing_ok=True)


def hash_of_counts(counts: IntArray) -> np.int64:
    """A hash of the counts, which is stored after them."""
    return np.frombuffer(hashlib.blake2b(counts.tobytes(), digest_size=8).digest(), dtype=np.int64)[0]
