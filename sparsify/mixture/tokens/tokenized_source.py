"""A tokenised source as one run sees it: the shortest prefix of its documents that covers the run's need.

The prefix is the same whatever else the cache holds, and whether the source was tokenised long ago or is being tokenised
right now: the data of a run never depend on which other runs came before, or on how fast anything was.
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class ShardDocuments:
    """The documents of one side of the split in one shard.

    Attributes:
        shard: The opened shard.
        starts: Offset of each document's first token in the shard. [D] int64
        lengths: Tokens of each document. [D] int64
    """

    shard: Shard
    starts: IntArray
    lengths: IntArray


class TokenizedSource:
    """One source of a mixture as tokens, cut to what a run needs.

    Args:
        name: Its name in the mixture.
        cache: Its cache folder, which may still be growing.
        need: What the run reads of it.
    """

    def __init__(self, name: str, cache: SourceCache, need: Need) -> None:
        self.name, self.cache, self.need = name, cache, need
        self.refresh()

    @property
    def fingerprint(self) -> str:
        """Of everything that its tokens depend on."""
        return self.cache.folder.name

    @property
    def info(self) -> SourceInfo:
        """Dtype, loss mask and tokenizer."""
        info = self.cache.info
        assert info is not None, f"{self.cache.folder} is no token cache"
        return info

    def refresh(self) -> None:
        """Takes in what was tokenised since the last call."""
        self.cache.refresh()
        self._train_ends = np.cumsum([record.train_tokens for record in self.cache.records])

    @property
    def settled(self) -> bool:
        """Whether everything that the run will see of its training text is here."""
        return self.cache.complete or self._train_tokens_here >= self.need.train_tokens

    @property
    def held_out_settled(self) -> bool:
        """Whether everything that the run will see of its held-out text is here."""
        here = sum(record.held_out_tokens for record in self.cache.records)
        return self.cache.complete or here >= self.need.held_out_tokens

    @property
    def covered(self) -> bool:
        """Whether nothing has to be tokenised for this run."""
        return self.settled and self.held_out_settled

    @property
    def num_shards(self) -> int:
        """Shards that training may read by now; all there will be once `settled`."""
        if not self.settled:
            return self.cache.num_closed
        reaching = int(np.searchsorted(self._train_ends, self.need.train_tokens))
        return min(reaching + 1, len(self.cache.records))

    def train_documents(self, number: int) -> ShardDocuments:
        """The training documents of one shard, up to where the need is met."""
        shard = self.cache.shard(number)
        chosen = np.flatnonzero(~shard.held_out)
        lengths = shard.lengths[chosen]
        before = int(self._train_ends[number - 1]) if number else 0
        taken = int(np.searchsorted(np.cumsum(lengths), self.need.train_tokens - before)) + 1
        chosen = chosen[:taken]
        return ShardDocuments(shard, shard.starts[chosen], shard.lengths[chosen])

    def is_whole(self, number: int) -> bool:
        """Whether training reads all documents of a shard, which then never changes."""
        closed = number < self.cache.num_closed
        return closed and int(self._train_ends[number]) <= self.need.train_tokens

    def held_out_documents(self) -> list[ShardDocuments]:
        """Held-out documents, shard by shard, up to where the need is met."""
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
        """Training documents that the run sees; known once `settled`."""
        return sum(len(self.train_documents(number).lengths) for number in range(self.num_shards))

    @property
    def num_train_tokens(self) -> int:
        """Tokens of one epoch of training; known once `settled`."""
        if not self.num_shards:
            return 0
        last = self.num_shards - 1
        before = int(self._train_ends[last - 1]) if last else 0
        return before + int(self.train_documents(last).lengths.sum())

    @property
    def num_held_out_tokens(self) -> int:
        """Held-out tokens that the run measures on."""
        return sum(int(documents.lengths.sum()) for documents in self.held_out_documents())

    @property
    def _train_tokens_here(self) -> int:
        return int(self._train_ends[-1]) if len(self._train_ends) else 0
