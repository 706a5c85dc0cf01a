"""Ingest: documents → tokens in the cache, a batch at a time, as far as a run needs them.

A source is only read as far as the budget reaches. What one run tokenised another reuses, and one that needs more goes on where the
last one stopped, or was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from sparsify.errors import MixtureError
from sparsify.files import storage_errors, write_text
from sparsify.mixture.cache import Shard, ShardWriter, SourceCache, SourceInfo
from sparsify.mixture.cleaning import Cleaner
from sparsify.mixture.documents import Document, is_held_out
from sparsify.mixture.encoding import (
    Encoded,
    Encoder,
    Tokenizer,
    check_tokenizer,
    tokenizer_fingerprint,
)
from sparsify.mixture.files import SourceFile, source_files
from sparsify.mixture.fingerprint import source_fingerprint
from sparsify.mixture.quarantine import BadRows
from sparsify.mixture.sources import read_documents
from sparsify.mixture.tokens import Need, ShardDocuments, TokenizedSource
from sparsify.recipe import MixtureSection

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 22
QUARANTINE_FILE = "quarantine.json"
"""Bad rows by reason with examples, as far as the source was read."""
REFUSALS_FILE = "refusals.json"
"""The same as of the last closed shard: where an ingest goes on, what it skips is not encoded again."""

Progress = Callable[[str, int, int], None]
"""Called with a source's name, its training tokens so far, and the training tokens needed."""


@dataclass(frozen=True)
class Ingest:
    """What to tokenise for one source of a mixture, and where to.

    Args:
        name: The source's name in its mixture.
        mixture: The mixture.
        tokenizer: A fast Hugging Face tokenizer.
        need: How far to read.
        cache_dir: Where tokenised sources are kept.
    """

    name: str
    mixture: MixtureSection
    tokenizer: Tokenizer
    need: Need
    cache_dir: Path

    def open(self, files: Sequence[SourceFile] | None = None) -> TokenizedSource:
        """The source as far as it is in the cache.

        Args:
            files: Its files as they were found before; as they are now unless given.

        Raises:
            MixtureError: If a file of it is missing, or everything of it lies on one side of the held-out split.
        """
        source = self.mixture.sources[self.name]
        fingerprint = source_fingerprint(self.name, source, self.mixture, self.tokenizer, files)
        cache = SourceCache(self.cache_dir.expanduser() / fingerprint)
        found = TokenizedSource(self.name, cache, self.need)
        if found.covered:
            _check_split(found, self.mixture.validation_fraction)
        return found

    def run(self, on_progress: Progress | None = None) -> TokenizedSource:
        """Tokenises what is missing, in this process, and returns the whole.

        Raises:
            MixtureError: If the source or the tokenizer cannot supply the tokens.
            StorageError: If the cache cannot be written.
        """
        found = self.open()
        if found.covered:
            return found
        with Ingesting(self) as ingesting:
            while ingesting.step():
                if on_progress is not None:
                    on_progress(self.name, ingesting.train_tokens, self.need.train_tokens)
        return self.open()


def bad_rows_of(source: TokenizedSource) -> BadRows | None:
    """What was left out of a source for being unreadable; None before it was read as far as any run needed it."""
    path = source.cache.folder / QUARANTINE_FILE
    return BadRows.from_json(path.read_bytes()) if path.is_file() else None


class Ingesting:
    """One source being tokenised; holds the lock of its cache folder.

    Args:
        task: What to tokenise.
        wait: Whether to wait for another process that is at it; else entering raises filelock.Timeout.
    """

    def __init__(self, task: Ingest, *, wait: bool = True) -> None:
        self.task, self._wait = task, wait
        source, mixture = task.mixture.sources[task.name], task.mixture
        responses_only = source.group == "instruction" and mixture.instruction_loss == "responses"
        self._bad_rows = BadRows(task.name, mixture.max_bad_fraction)
        self._encoder = Encoder(
            task.name,
            task.tokenizer,
            responses_only=responses_only,
            chat_template=mixture.chat_template,
            bad_rows=self._bad_rows,
        )
        self._info = SourceInfo(
            token_dtype=self._encoder.token_dtype.name,
            has_loss_mask=responses_only,
            tokenizer=tokenizer_fingerprint(task.tokenizer),
            end_token=int(task.tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
        )
        self._writer: ShardWriter | None = None
        self._finished = False

    def __enter__(self) -> Self:
        task = self.task
        # As they are now: reading notices when one of them changes.
        self._files = source_files(task.name, task.mixture.sources[task.name])
        folder = task.open(self._files).cache.folder
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder.with_suffix(".lock"))
            self._lock.acquire(blocking=self._wait)
            try:
                # While this one waited, another process may have tokenised all of it.
                self._finished = task.open().covered
                if not self._finished:
                    self._begin(folder)
            except BaseException:
                self._lock.release()
                raise
        return self

    def _begin(self, folder: Path) -> None:
        task = self.task
        writer = ShardWriter(folder, self._info)
        try:
            cleaner = Cleaner(task.mixture, folder, writer.read_documents)
        except (
            ValueError
        ):  # what it remembered is gone, so that duplicates could not be told any more
            writer.clear()
            cleaner = Cleaner(task.mixture, folder, 0)
        self._writer, self._cleaner = writer, cleaner
        if writer.read_documents:
            previous = (folder / REFUSALS_FILE).read_bytes()
            self._bad_rows.carry_refusals(BadRows.from_json(previous))
        documents = read_documents(
            task.name,
            task.mixture.sources[task.name],
            self._bad_rows,
            tokenizer=task.tokenizer,
            files=self._files,
            skip_documents=writer.read_documents,
        )
        self._batches = batches(documents)
        # The first step has nothing to tokenise while it reads.
        self._batch: list[Document] | None = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the cache folder."""
        if self._writer is not None:
            self._writer.close()
            self._cleaner.close()
        self._lock.release()

    @property
    def train_tokens(self) -> int:
        """Training tokens in the cache by now."""
        return self._writer.train_tokens if self._writer else self.task.need.train_tokens

    @property
    def progress(self) -> float:
        """Share of the training tokens needed that is there by now."""
        return self.train_tokens / max(self.task.need.train_tokens, 1)

    def step(self) -> bool:
        """Tokenises one batch of documents. Returns whether there is more to do."""
        writer, need = self._writer, self.task.need
        if self._finished or writer is None:
            return False
        with storage_errors(writer.folder):
            batch = self._batch
            if batch is not None:
                self._add(batch, writer)
            enough = writer.train_tokens >= need.train_tokens
            if batch is None or (enough and writer.held_out_tokens >= need.held_out_tokens):
                self._bad_rows.check()
                self._cleaner.finish()
                write_text(writer.folder / QUARANTINE_FILE, self._bad_rows.to_json() + "\n")
                writer.finish(complete=batch is None)
                self._finished = True
        return not self._finished

    def _add(self, batch: list[Document], writer: ShardWriter) -> None:
        kept = self._cleaner.clean(batch)
        tokenized = self._encoder.encode(kept)
        try:
            # While this one is tokenised.
            self._batch = next(self._batches, None)
        finally:
            # Also when reading meets an error: what was read before it counts.
            self._write(kept, tokenized, writer)

    def _write(
        self, kept: list[Document], tokenized: Iterator[Encoded], writer: ShardWriter
    ) -> None:
        for document, (ids, mask) in zip(kept, tokenized, strict=True):
            if len(ids):  # the chat template may refuse a document
                held_out = is_held_out(document.origin, self.task.mixture.validation_fraction)
                writer.add(ids, mask, held_out)
        if writer.shard_is_full:
            self._cleaner.commit()
            write_text(writer.folder / REFUSALS_FILE, self._bad_rows.to_json() + "\n")
        writer.end_batch(self._cleaner.num_documents)


def mixture_ingests(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    train_tokens: Mapping[str, int],
    held_out_tokens: int,
    window_tokens: int,
    cache_dir: Path,
) -> dict[str, Ingest]:
    """What to tokenise of every source of a mixture that is drawn from.

    Args:
        mixture: The sources.
        tokenizer: A fast Hugging Face tokenizer.
        train_tokens: Training tokens needed of each source.
        held_out_tokens: Held-out tokens wanted of each source, if it has as many.
        window_tokens: Length of a window: no source gives less than one for training and one held out.
        cache_dir: Where tokenised sources are kept.

    Raises:
        MixtureError: If the tokenizer cannot serve.
    """
    check_tokenizer(tokenizer)
    least = Need(window_tokens, max(held_out_tokens, window_tokens))
    return {
        name: Ingest(
            name,
            mixture,
            tokenizer,
            replace(least, train_tokens=max(tokens, least.train_tokens)),
            cache_dir,
        )
        for name, tokens in train_tokens.items()
    }


def text_documents(
    documents: Iterator[Document], encoder: Encoder, num_tokens: int
) -> ShardDocuments:
    """The first documents that cover `num_tokens`, tokenised in memory without any file."""
    ids: list[NDArray[np.unsignedinteger]] = []
    for batch in batches(documents):
        ids += [tokens for tokens, _ in encoder.encode(batch) if len(tokens)]
        if sum(map(len, ids)) >= num_tokens:
            break
    flat = np.concatenate(ids) if ids else np.empty(0, dtype=encoder.token_dtype)
    lengths = np.array([len(tokens) for tokens in ids], dtype=np.int64)
    shard = Shard(flat, None, lengths, np.ones(len(ids), dtype=np.bool_))
    return ShardDocuments(shard, shard.starts, lengths)


def _check_split(source: TokenizedSource, validation_fraction: float) -> TokenizedSource:
    sides = {
        "training": (source.num_train_tokens, "lower"),
        "held-out": (source.num_held_out_tokens, "raise"),
    }
    for side, (num_tokens, change) in sides.items():
        if num_tokens == 0:
            num_documents = sum(record.num_documents for record in source.cache.records)
            raise MixtureError(
                f"Source {source.name!r}: mixture.validation_fraction={validation_fraction} leaves none of its "
                f"{num_documents} document(s) on the {side} side.",
                allowed="Every source needs at least one document for training and one held out.",
                next_step=f"Add documents, or {change} mixture.validation_fraction.",
            )
    return source


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
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
