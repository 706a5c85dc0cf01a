"""Ingest: every source is tokenised once, to memory-mapped tokens with document offsets, and reused afterwards.

    cache_dir/<fingerprint>/
      index.json                      counts, written last
      tokens-00000.bin …              all documents one after another, uint16 or uint32
      loss-00000.bin …                instruction sources only: 1 where a token carries loss as a target
      lengths.bin  held_out.bin       tokens of each document (int64), and its side of the held-out split (uint8)

A source is read only as far as a run needs it. What a run then sees is the shortest prefix of documents that
covers its need, even when the cache holds more: the data of a run never depends on which other runs came before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sparsify.errors import MixtureError, StorageError
from sparsify.mixture.cache import SHARD_TOKENS, CacheWriter, Shards, open_cache, read_shards
from sparsify.mixture.documents import Document, is_held_out
from sparsify.mixture.encoding import (
    Encoder,
    Tokenizer,
    check_tokenizer,
    tokenizer_fingerprint,
)
from sparsify.mixture.fingerprint import source_fingerprint
from sparsify.mixture.quarantine import BadRows
from sparsify.mixture.sources import read_documents
from sparsify.recipe import MixtureSection, SourceSection, token_shares

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 20

Progress = Callable[[str, int, int], None]
"""Called with a source's name, its training tokens so far, and the training tokens needed."""


@dataclass(frozen=True)
class TokenizedSource:
    """One source as tokens: `num_documents` documents, laid one after another.

    Args:
        name: Its name in the mixture.
        fingerprint: Of everything that its tokens depend on.
        tokenizer: Fingerprint of the tokenizer.
        complete: Whether these are all documents of the source.
        lengths: Tokens of each document. [D] int64
        held_out: Documents kept from training. [D] bool
        token_shards: Memory-mapped tokens, SHARD_TOKENS a shard.
        loss_shards: Memory-mapped loss mask in the same shards; empty when every token carries loss.
    """

    name: str
    fingerprint: str
    tokenizer: str
    complete: bool
    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    token_shards: Shards
    loss_shards: Shards

    @property
    def num_documents(self) -> int:
        """Documents on both sides of the held-out split."""
        return len(self.lengths)

    @cached_property
    def num_train_tokens(self) -> int:
        """Tokens of one epoch of training."""
        return int(self.lengths[~self.held_out].sum())

    @cached_property
    def num_validation_tokens(self) -> int:
        """Tokens kept from training."""
        return int(self.lengths[self.held_out].sum())

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """Offset of each document's first token. [D] int64"""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def has_loss_mask(self) -> bool:
        """Whether some tokens carry no loss."""
        return bool(self.loss_shards)

    def tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """Tokens [start, stop) of all documents laid one after another."""
        return read_shards(self.token_shards, start, stop).astype(np.int64)

    def loss_mask(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Whether each of the tokens [start, stop) carries loss as a target."""
        if not self.has_loss_mask:
            return np.ones(stop - start, dtype=np.bool_)
        return read_shards(self.loss_shards, start, stop).astype(np.bool_)


def ingest_mixture(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    budget_tokens: int,
    window_tokens: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
    held_out_tokens: int = 0,
) -> dict[str, TokenizedSource]:
    """Tokenises every source of a mixture that has a share, as far as the budget needs.

    Args:
        mixture: The sources and their shares.
        tokenizer: A fast Hugging Face tokenizer.
        budget_tokens: Training tokens over all sources.
        window_tokens: Length of one window; no source gets less than one for training and one held out.
        cache_dir: Where tokenised sources are kept.
        on_progress: Told about every batch of documents.
        held_out_tokens: Held-out tokens wanted of each source, if it has as many.

    Returns:
        The tokenised sources by name.

    Raises:
        MixtureError: If a source cannot supply training or held-out tokens.
        StorageError: If the cache cannot be written.
    """
    return {
        name: ingest(
            name,
            mixture.sources[name],
            mixture,
            tokenizer,
            # The last window of a source may begin just before its share of the budget ends.
            needed_tokens=math.ceil(budget_tokens * share) + window_tokens,
            needed_held_out_tokens=max(held_out_tokens, window_tokens),
            cache_dir=cache_dir,
            on_progress=on_progress,
        )
        for name, share in token_shares(mixture).items()
    }


def ingest(
    name: str,
    source: SourceSection,
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    needed_tokens: int,
    cache_dir: Path,
    needed_held_out_tokens: int = 1,
    on_progress: Progress | None = None,
) -> TokenizedSource:
    """Tokenises one source, or reuses what an earlier run tokenised.

    Args:
        name: The source's name in its mixture.
        source: Where its text is.
        mixture: Gives the held-out fraction and which instruction tokens carry loss.
        tokenizer: A fast Hugging Face tokenizer.
        needed_tokens: Training tokens after which reading may stop.
        cache_dir: Where tokenised sources are kept.
        needed_held_out_tokens: Held-out tokens after which reading may stop.
        on_progress: Told about every batch of documents.

    Raises:
        MixtureError: If the source or the tokenizer cannot supply the tokens.
        StorageError: If the cache cannot be written.
    """
    check_tokenizer(tokenizer)
    fingerprint = source_fingerprint(name, source, mixture, tokenizer)
    need = _Need(needed_tokens, needed_held_out_tokens)
    folder = cache_dir.expanduser() / fingerprint
    found = _load(name, folder, need)
    if found is None:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.with_suffix(".lock")):
                found = _load(name, folder, need)  # another process may have written it meanwhile
                if found is None:
                    _write(name, source, mixture, tokenizer, need, folder, on_progress)
                    found = _load(name, folder, need)
        except OSError as error:
            raise StorageError(
                f"The token cache {folder} cannot be written: {error}.",
                next_step="Free some space, or set cache_dir to a folder on another disk.",
            ) from error
    assert found is not None, f"{folder} was written but cannot be read back"
    return _check_split(found, mixture.validation_fraction)


def tokenize_in_memory(
    documents: Iterator[Document], encoder: Encoder, num_tokens: int
) -> TokenizedSource:
    """The first documents that cover `num_tokens`, all of them held out, without any file."""
    ids: list[NDArray[np.unsignedinteger]] = []
    for batch in _batches(documents):
        ids += [tokens for tokens, _ in encoder.encode(batch) if len(tokens)]
        if sum(map(len, ids)) >= num_tokens:
            break
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=encoder.token_dtype)
    return TokenizedSource(
        name=encoder.name,
        fingerprint="",
        tokenizer=tokenizer_fingerprint(encoder.tokenizer),
        complete=False,
        lengths=np.array([len(tokens) for tokens in ids], dtype=np.int64),
        held_out=np.ones(len(ids), dtype=np.bool_),
        token_shards=tuple(
            flat[first : first + SHARD_TOKENS] for first in range(0, len(flat), SHARD_TOKENS)
        ),
        loss_shards=(),
    )


@dataclass(frozen=True)
class _Need:
    train_tokens: int
    held_out_tokens: int

    def is_met(self, train_tokens: int, held_out_tokens: int) -> bool:
        return train_tokens >= self.train_tokens and held_out_tokens >= self.held_out_tokens

    def num_documents(self, lengths: NDArray[np.int64], held_out: NDArray[np.bool_]) -> int | None:
        """Length of the shortest prefix of documents that covers the need, None if all of them do not."""
        ends = []
        for side, tokens in (
            (~held_out, self.train_tokens),
            (held_out, self.held_out_tokens),
        ):
            totals = np.cumsum(np.where(side, lengths, 0))
            ends.append(int(np.searchsorted(totals, tokens)) + 1)
        return max(ends) if max(ends) <= len(lengths) else None


def _write(
    name: str,
    source: SourceSection,
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    need: _Need,
    folder: Path,
    on_progress: Progress | None,
) -> None:
    responses_only = source.group == "instruction" and mixture.instruction_loss == "responses"
    bad_rows = BadRows(name, mixture.max_bad_fraction)
    encoder = Encoder(
        name,
        tokenizer,
        responses_only=responses_only,
        chat_template=mixture.chat_template,
        bad_rows=bad_rows,
    )
    documents = read_documents(name, source, bad_rows, tokenizer=tokenizer)
    with CacheWriter(folder, encoder.token_dtype, has_loss_mask=responses_only) as writer:
        for batch in _batches(documents):
            for document, (ids, carries_loss) in zip(batch, encoder.encode(batch), strict=True):
                if len(ids):
                    held_out = is_held_out(document.origin, mixture.validation_fraction)
                    writer.add(ids, carries_loss, held_out)
            if on_progress is not None:
                on_progress(name, writer.num_train_tokens, need.train_tokens)
            if need.is_met(writer.num_train_tokens, writer.num_held_out_tokens):
                break
        bad_rows.check()
        writer.finish(
            complete=next(documents, None) is None,
            tokenizer=tokenizer_fingerprint(tokenizer),
        )


def _load(name: str, folder: Path, need: _Need) -> TokenizedSource | None:
    """What the cache has of a source, cut to the need; None if it does not cover it."""
    cached = open_cache(folder)
    if cached is None:
        return None
    taken = need.num_documents(cached.lengths, cached.held_out)
    if taken is None and not cached.index.complete:
        return None
    return TokenizedSource(
        name=name,
        fingerprint=folder.name,
        tokenizer=cached.index.tokenizer,
        complete=cached.index.complete and taken in (None, len(cached.lengths)),
        lengths=cached.lengths[:taken],
        held_out=cached.held_out[:taken],
        token_shards=cached.token_shards,
        loss_shards=cached.loss_shards,
    )


def _check_split(source: TokenizedSource, validation_fraction: float) -> TokenizedSource:
    sides = {
        "training": (source.num_train_tokens, "lower"),
        "held-out": (source.num_validation_tokens, "raise"),
    }
    for side, (num_tokens, change) in sides.items():
        if num_tokens == 0:
            raise MixtureError(
                f"Source {source.name!r}: mixture.validation_fraction={validation_fraction} leaves none of its "
                f"{source.num_documents} document(s) on the {side} side.",
                allowed="Every source needs at least one document for training and one held out.",
                next_step=f"Add documents, or {change} mixture.validation_fraction.",
            )
    return source


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches small enough for memory, whatever the length of documents, and large enough for the tokenizer."""
    batch: list[Document] = []
    num_characters = 0
    for document in documents:
        batch.append(document)
        num_characters += document.num_characters
        if len(batch) == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch
