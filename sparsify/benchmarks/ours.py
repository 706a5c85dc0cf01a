"""Our side: the mixture of the corpus, from text to windows, through the same parts that training uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsify.benchmarks.corpus import Corpus
from sparsify.mixture.encoding import Tokenizer
from sparsify.mixture.ingest import Ingest, mixture_ingests
from sparsify.mixture.plan import Anchor, SourceSchedule
from sparsify.mixture.shares import Shares
from sparsify.mixture.tokens import TokenizedSource
from sparsify.mixture.windows import WindowReader

BATCH_WINDOWS = 8
MAX_PERIOD_WINDOWS = 10**10

Piece = tuple[str, int, int, int]
"""Source, shard, document within the shard, and first token: a document longer than a window has several pieces."""


@dataclass(frozen=True)
class Ours:
    """A run over the corpus.

    Args:
        corpus: The files.
        tokenizer: A fast tokenizer.
        window_tokens: Tokens of a window.
        seed: Decides the order.
        budget_tokens: How far each source is read.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    window_tokens: int
    seed: int
    budget_tokens: int

    @property
    def shares(self) -> Shares:
        """The demand of every source."""
        return Shares.constant(self.corpus.shares)

    def anchor(self, window: int) -> Anchor:
        """What a checkpoint at this window saves of the schedule, so that a resumed run need not count up to it."""
        return SourceSchedule(self.shares).anchor(window)

    def far_window(self, num_tokens: int, window_tokens: int) -> int | None:
        """A window at least `num_tokens` into a run that needs no counting up to it.

        Returns:
            The window at which all shares are met exactly; None where shares have so many digits that none is near.
        """
        period = self.shares.period
        if period is None or period > MAX_PERIOD_WINDOWS:
            return None
        return -(-num_tokens // (window_tokens * period)) * period

    def ingests(self, cache_dir: Path) -> dict[str, Ingest]:
        """What is to be tokenised."""
        return mixture_ingests(
            self.corpus.mixture,
            self.tokenizer,
            train_tokens={
                name: math.ceil(self.budget_tokens * share) + self.window_tokens
                for name, share in self.corpus.shares.items()
            },
            held_out_tokens=self.window_tokens,
            window_tokens=self.window_tokens,
            cache_dir=cache_dir,
        )

    def tokenize(self, cache_dir: Path) -> dict[str, TokenizedSource]:
        """Text → cache, in this process."""
        return {name: ingest.run() for name, ingest in self.ingests(cache_dir).items()}

    def reader(
        self, cache_dir: Path, window_tokens: int | None = None, anchor: Anchor | None = None
    ) -> WindowReader:
        """Opens a warm cache, as a process that begins or resumes does."""
        sources = {name: ingest.open() for name, ingest in self.ingests(cache_dir).items()}
        size = window_tokens or self.window_tokens
        return WindowReader(sources, SourceSchedule(self.shares, anchor), size, self.seed)


def draw(reader: WindowReader, first: int, count: int) -> None:
    """Draws windows in batches, as training would."""
    for start in range(first, first + count, BATCH_WINDOWS):
        reader.batch(start, min(BATCH_WINDOWS, first + count - start))


def pieces_of(reader: WindowReader, index: int) -> list[tuple[Piece, int, bool]]:
    """Every piece in a window, with its tokens and whether it is part of a document shorter than a window."""
    name, rank = reader.schedule.locate(index)
    stream = reader.streams[name]
    epoch, shard, window = stream.locate(rank)
    documents, packing = stream.packed(epoch, shard)
    piece = packing.pieces(window)
    columns = (packing.document[piece], packing.start[piece], packing.length[piece])
    found = []
    for document, start, length in np.stack(columns, axis=1).tolist():
        whole = int(documents.lengths[document])
        is_cut = length < whole <= reader.window_tokens
        found.append(((name, shard, document, start), length, is_cut))
    return found


def tokens_in(sources: dict[str, TokenizedSource]) -> int:
    """All tokens in the cache."""
    records = (record for source in sources.values() for record in source.cache.records)
    return sum(record.train_tokens + record.held_out_tokens for record in records)
