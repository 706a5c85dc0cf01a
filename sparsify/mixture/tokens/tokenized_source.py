"""A tokenised source as one run sees it: the shortest prefix of its documents that covers the run's need.

The prefix does not depend on what else the cache holds, nor on whether the source is still being tokenised. So the data
of a run do not depend on earlier runs or on timing.

How far ingest has come, everywhere in the package:

    complete         SourceCache, ShardRecord: the source was read to its end; it has no more documents
    train_ready      TokenizedSource: the cache holds all training tokens that the run needs (or the source is complete)
    held_out_ready   TokenizedSource: the same for held-out tokens
    ready            TokenizedSource: both; nothing is left to tokenise for this run
    is_final         TokenizedSource: the run reads all documents of this shard, and the shard will not change
    is_available     TrainingStream, SequenceReader: this training sequence can be read now
    can_start        launch.feeder: enough of a source is in the cache to start training
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.mixture.tokens.shards import Shard, SourceCache, SourceInfo

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Need:
    """How much of a source a run reads, in tokens."""

    train_tokens: int
    held_out_tokens: int = 1
    earlier_train_tokens: tuple[int, ...] = ()
    """The same of shorter budgets that the run had before: the documents that each of them reached stay packed as they were."""


@dataclass(frozen=True)
class ShardDocuments:
    """The training documents or the held-out documents of one shard.

    Attributes:
        shard: The opened shard.
        starts: Offset of each document's first token in the shard. [D] int64
        lengths: Number of tokens of each document. [D] int64
    """

    shard: Shard
    starts: IntArray
    lengths: IntArray


class TokenizedSource:
    """The tokens of one source, limited to what a run needs.

    Args:
        cache: The source's cache folder, which may still grow.
    """

    def __init__(self, name: str, cache: SourceCache, need: Need) -> None:
        self.name, self.cache, self.need = name, cache, need
        self.refresh()

    @property
    def fingerprint(self) -> str:
        return self.cache.folder.name

    @property
    def info(self) -> SourceInfo:
        info = self.cache.info
        assert info is not None, f"{self.cache.folder} is not a token cache"
        return info

    def refresh(self) -> None:
        self.cache.refresh()
        self._train_ends = np.cumsum([record.train_tokens for record in self.cache.records])

    def verify(self) -> None:
        """Forgets shards that are not as they were written, and those after them: ingest writes them again."""
        self.cache.verify(self._num_needed)
        self._train_ends = np.cumsum([record.train_tokens for record in self.cache.records])

    @property
    def _num_needed(self) -> int:
        """Shards that the run reads, as far as they are there."""
        train = held_out = 0
        for number, record in enumerate(self.cache.records):
            if train >= self.need.train_tokens and held_out >= self.need.held_out_tokens:
                return number
            train, held_out = train + record.train_tokens, held_out + record.held_out_tokens
        return len(self.cache.records)

    @property
    def train_ready(self) -> bool:
        """Whether the cache holds all training tokens that the run needs."""
        return self.cache.complete or self._train_tokens_cached >= self.need.train_tokens

    @property
    def held_out_ready(self) -> bool:
        cached = sum(record.held_out_tokens for record in self.cache.records)
        return self.cache.complete or cached >= self.need.held_out_tokens

    @property
    def ready(self) -> bool:
        """Whether nothing is left to tokenise for this run."""
        return self.train_ready and self.held_out_ready

    @property
    def num_shards(self) -> int:
        """Shards that training may read now; final once `train_ready`."""
        if not self.train_ready:
            return self.cache.num_closed
        reaching = int(np.searchsorted(self._train_ends, self.need.train_tokens))
        return min(reaching + 1, len(self.cache.records))

    def train_documents(self, number: int) -> ShardDocuments:
        """The training documents of one shard, up to the end of the need."""
        shard = self.cache.shard(number)
        chosen = np.flatnonzero(~shard.held_out)
        lengths = shard.lengths[chosen]
        before = int(self._train_ends[number - 1]) if number else 0
        taken = int(np.searchsorted(np.cumsum(lengths), self.need.train_tokens - before)) + 1
        chosen = chosen[:taken]
        return ShardDocuments(shard, shard.starts[chosen], shard.lengths[chosen])

    def pieces(self) -> list[tuple[int, int]]:
        """What is packed at a time, as the shard and the last training token of each piece: a shard, or what one of the run's budgets
        reached of it.
        """
        found = []
        for number in range(self.num_shards):
            end = int(self._train_ends[number])
            before = int(self._train_ends[number - 1]) if number else 0
            reached = [tokens for tokens in sorted(self.need.earlier_train_tokens) if before < tokens < end]
            lengths = self._train_lengths(number) if reached else None
            last = before
            for tokens in reached:
                assert lengths is not None
                ends = before + np.cumsum(lengths)
                place = int(ends[np.searchsorted(ends, tokens)])
                if last < place < end:
                    found.append((number, place))
                    last = place
            found.append((number, end))
        return found

    def piece_documents(self, pieces: Sequence[tuple[int, int]], place: int) -> ShardDocuments:
        """The training documents of one of `pieces`, up to the end of the need."""
        number, end = pieces[place]
        documents = self.train_documents(number)
        before = int(self._train_ends[number - 1]) if number else 0
        start = pieces[place - 1][1] if place and pieces[place - 1][0] == number else before
        ends = before + np.cumsum(documents.lengths)
        chosen = (ends > start) & (ends <= end)
        return ShardDocuments(documents.shard, documents.starts[chosen], documents.lengths[chosen])

    def _train_lengths(self, number: int) -> IntArray:
        shard = self.cache.shard(number)
        return shard.lengths[~shard.held_out]

    def is_final(self, number: int) -> bool:
        """Whether training reads all documents of a shard, and the shard will not change."""
        closed = number < self.cache.num_closed
        return closed and int(self._train_ends[number]) <= self.need.train_tokens

    def held_out_documents(self) -> list[ShardDocuments]:
        """Held-out documents, shard by shard, up to the end of the need."""
        wanted, found = self.need.held_out_tokens, []
        for number in range(len(self.cache.records)):
            if wanted <= 0:
                break
            shard = self.cache.shard(number)
            chosen = np.flatnonzero(shard.held_out)
            ends = np.cumsum(shard.lengths[chosen])
            chosen = chosen[: int(np.searchsorted(ends, wanted)) + 1]
            found.append(ShardDocuments(shard, shard.starts[chosen], shard.lengths[chosen]))
            wanted -= int(shard.lengths[chosen].sum())
        return found

    @property
    def num_documents(self) -> int:
        """Training documents that the run sees; final once `train_ready`."""
        return sum(len(self.train_documents(number).lengths) for number in range(self.num_shards))

    @property
    def num_train_tokens(self) -> int:
        """Tokens of one training epoch; final once `train_ready`."""
        if not self.num_shards:
            return 0
        last = self.num_shards - 1
        before = int(self._train_ends[last - 1]) if last else 0
        return before + int(self.train_documents(last).lengths.sum())

    @property
    def num_held_out_tokens(self) -> int:
        return sum(int(documents.lengths.sum()) for documents in self.held_out_documents())

    @property
    def _train_tokens_cached(self) -> int:
        return int(self._train_ends[-1]) if len(self._train_ends) else 0
