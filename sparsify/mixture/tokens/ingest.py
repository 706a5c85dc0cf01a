"""Ingest: tokenises documents into the cache, batch by batch, as far as a run needs them.

A source is read only as far as the budget reaches. Runs share the cache: a run that needs more tokens continues where
the last one stopped or was killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
from filelock import FileLock

from sparsify.errors import MixtureError
from sparsify.files import storage_errors, write_text
from sparsify.metadata import user_path
from sparsify.mixture.cleaning.contamination import (
    REPORT_FILE,
    ContaminationLog,
    contamination_report,
)
from sparsify.mixture.cleaning.decontaminate import Decontaminator
from sparsify.mixture.cleaning.duplicates import SeenDocuments
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.documents import Document, is_held_out
from sparsify.mixture.sources.read import read_documents
from sparsify.mixture.sources.source_files import SourceFile, source_files
from sparsify.mixture.tokens.chat_template import chat_template_text
from sparsify.mixture.tokens.encoder import (
    Encoded,
    Encoder,
    Tokenizer,
    check_tokenizer,
    tokenizer_fingerprint,
)
from sparsify.mixture.tokens.pool import SIZES, IngestSizes, batches, parts, tokenizer_threads
from sparsify.mixture.tokens.shards import (
    Shard,
    ShardWriter,
    SourceCache,
    SourceInfo,
    source_fingerprint,
)
from sparsify.mixture.tokens.tokenized_source import Need, ShardDocuments, TokenizedSource
from sparsify.recipe.mixture import MixtureSection

INITIAL_TOKENS_AND_CHARACTERS = (300, 1000)
"""Initial estimate of tokens per characters; affects scheduling only, never the output."""
BAD_ROWS_FILE = "bad_rows.json"
"""Bad rows by reason with examples, as far as the source was read."""
REFUSALS_FILE = "refusals.json"
"""Bad rows as of the last closed shard. A resumed ingest needs them, because it does not encode skipped documents."""

Progress = Callable[[str, int, int], None]
"""Called with a source's name, its training tokens so far, and the training tokens needed."""


@dataclass(frozen=True)
class Ingest:
    """What to tokenise for one source of a mixture, and where to store it."""

    name: str
    mixture: MixtureSection
    tokenizer: Tokenizer
    need: Need
    cache_dir: Path
    sizes: IngestSizes = SIZES

    def open(self, files: Sequence[SourceFile] | None = None, *, verify: bool = True) -> TokenizedSource:
        """The source as far as it is in the cache; `files` are those found earlier. With `verify`, what is damaged of
        what the run needs is not counted as being there; without it, a damaged shard is an error when it is read.
        Raises MixtureError if a file is missing, or all documents fall on one side of the held-out split.
        """
        source = self.mixture.sources[self.name]
        fingerprint = source_fingerprint(self.name, source, self.mixture, self.tokenizer, files)
        cache = SourceCache(user_path(self.cache_dir) / fingerprint)
        found = TokenizedSource(self.name, cache, self.need)
        if verify:
            found.verify()
        if found.ready:
            _check_split(found, self.mixture.validation_fraction)
        return found

    def run(self, on_progress: Progress | None = None) -> TokenizedSource:
        """Tokenises what the cache lacks, in this process, and returns the source.

        Raises:
            MixtureError: If the source cannot supply the tokens, or the tokenizer is unsuitable.
            StorageError: If the cache cannot be written.
        """
        found = self.open()
        if found.ready:
            return found
        with IngestSession(self) as session:
            while session.step():
                if on_progress is not None:
                    on_progress(self.name, session.train_tokens, self.need.train_tokens)
        return self.open()


def bad_rows_of(source: TokenizedSource) -> BadRows | None:
    """None until the source was read as far as some run needed it."""
    path = source.cache.folder / BAD_ROWS_FILE
    try:
        return BadRows.from_json(path.read_bytes()) if path.is_file() else None
    except ValueError as error:
        raise MixtureError(
            f"{path} cannot be read: it is not as it was written.",
            next_step=f"Remove {source.cache.folder}, then run the same command again: it tokenises the source again.",
        ) from error


class IngestSession:
    """One source while it is tokenised. Holds the lock of the source's cache folder.

    Args:
        wait: Whether to wait for another process that holds the lock; otherwise entering raises filelock.Timeout.
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
            chat_template=(
                chat_template_text(mixture.chat_template, task.tokenizer) if source.group == "instruction" else None
            ),
            end_token=int(task.tokenizer.eos_token_id),  # pyright: ignore[reportArgumentType]
        )
        # Replaced by the source's own ratio as documents are written.
        self._written_tokens, self._written_characters = INITIAL_TOKENS_AND_CHARACTERS
        self._writer: ShardWriter | None = None
        self._finished = False

    def __enter__(self) -> Self:
        task = self.task
        # Reading compares the files with this state and fails if one of them changes.
        self._files = source_files(task.name, task.mixture.sources[task.name])
        folder = task.open(self._files).cache.folder
        with storage_errors(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(folder.with_suffix(".lock"))
            self._lock.acquire(blocking=self._wait)
            try:
                # Another process may have finished the source while this one waited for the lock.
                self._finished = task.open().ready
                if not self._finished:
                    self._begin(folder)
            except BaseException:
                self._lock.release()
                raise
        return self

    def _begin(self, folder: Path) -> None:
        task = self.task
        writer = ShardWriter(folder, self._info, task.sizes.shard_tokens)
        try:
            cleaner = Cleaner(task.mixture, folder, writer.read_documents)
            if writer.read_documents:
                previous = (folder / REFUSALS_FILE).read_bytes()
                self._bad_rows.carry_refusals(BadRows.from_json(previous))
        except (FileNotFoundError, ValueError):  # the logs are gone: without them, duplicates cannot be detected
            writer.clear()
            cleaner = Cleaner(task.mixture, folder, 0)
        self._writer, self._cleaner = writer, cleaner
        documents = read_documents(
            task.name,
            task.mixture.sources[task.name],
            self._bad_rows,
            tokenizer=task.tokenizer,
            files=self._files,
            skip_documents=writer.read_documents,
        )
        self._read_documents = writer.read_documents
        self._parts = parts(documents, task.sizes)
        # Empty: the first step only reads.
        self._batch: deque[_Part] | None = deque()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._cleaner.close()
        self._lock.release()

    @property
    def train_tokens(self) -> int:
        return self._writer.train_tokens if self._writer else self.task.need.train_tokens

    @property
    def progress(self) -> float:
        """Fraction of the needed training tokens that is in the cache."""
        return self.train_tokens / max(self.task.need.train_tokens, 1)

    def step(self) -> bool:
        """Writes one batch of documents while it reads the next. Returns whether there is more to do."""
        writer, need = self._writer, self.task.need
        if self._finished or writer is None:
            return False
        with storage_errors(writer.folder):
            batch = self._batch
            if batch is not None:
                self._read_and_write(batch, writer)
            enough = writer.train_tokens >= need.train_tokens
            if batch is None or (enough and writer.held_out_tokens >= need.held_out_tokens):
                self._bad_rows.check()
                self._cleaner.finish(writer.read_documents)
                write_text(writer.folder / BAD_ROWS_FILE, self._bad_rows.to_json() + "\n")
                writer.finish(complete=batch is None)
                self._finished = True
        return not self._finished

    def _read_and_write(self, batch: deque[_Part], writer: ShardWriter) -> None:
        """Reads the next batch part by part, and writes the current one in between."""
        read_documents = self._read_documents
        read: deque[_Part] = deque()
        unreadable: Exception | None = None
        more = True
        self._keep_busy(batch, read, writer)
        while more or batch:
            try:
                more = more and self._read_part(read)
            except Exception as error:  # raised below, after the documents before it are written
                more, unreadable = False, error
            self._keep_busy(batch, read, writer)
            if batch:
                self._write(batch.popleft(), writer)
        self._end_batch(read_documents, writer)
        if unreadable is not None:
            raise unreadable

    def _read_part(self, read: deque[_Part]) -> bool:
        documents, ends_batch = next(self._parts, (None, True))
        if documents is None:
            self._batch = None
            return False
        read.append(_Part(self._cleaner.clean(documents)))
        if ends_batch:
            self._batch, self._read_documents = read, self._cleaner.num_documents
        return not ends_batch

    def _keep_busy(self, batch: deque[_Part], read: deque[_Part], writer: ShardWriter) -> None:
        """Starts as many tokenizer tasks as the threads can take until the next call."""
        # If the current batch probably meets the need, tokenising the next one would be wasted.
        wanted = batch if self._may_be_enough(batch, writer) else chain(batch, read)
        for part in wanted:
            if not tokenizer_threads().has_capacity:
                return
            part.start(self._encoder)

    def _may_be_enough(self, batch: Iterable[_Part], writer: ShardWriter) -> bool:
        """Whether this batch probably meets the need; estimates its tokens from its characters."""
        tokens = sum(part.num_characters for part in batch) * self._written_tokens / self._written_characters
        held_out = tokens * self.task.mixture.validation_fraction
        need = self.task.need
        return (
            writer.train_tokens + tokens - held_out >= need.train_tokens
            and writer.held_out_tokens + held_out >= need.held_out_tokens
        )

    def _write(self, part: _Part, writer: ShardWriter) -> None:
        part.start(self._encoder)
        encoded = part.result()
        accepted = encoded.lengths > 0  # the chat template may refuse a document
        fraction = self.task.mixture.validation_fraction
        held_out = [is_held_out(document.origin, fraction) for document in part.documents]
        sides = np.array(held_out, dtype=np.bool_)
        writer.add(encoded.ids, encoded.carries_loss, encoded.lengths[accepted], sides[accepted])
        self._written_characters += part.num_characters
        self._written_tokens += len(encoded.ids)

    def _end_batch(self, read_documents: int, writer: ShardWriter) -> None:
        if writer.shard_is_full:
            self._cleaner.commit()
            write_text(writer.folder / REFUSALS_FILE, self._bad_rows.to_json() + "\n")
        writer.end_batch(read_documents)


class _Part:
    """Documents of a batch that are tokenised together."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.num_characters = sum(document.num_characters for document in documents)
        self._result: Callable[[], Encoded] | None = None

    def start(self, encoder: Encoder) -> None:
        self._result = self._result or encoder.start(self.documents)

    def result(self) -> Encoded:
        assert self._result is not None, "not started"
        return self._result()


def mixture_ingests(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    train_tokens: Mapping[str, int],
    held_out_tokens: int,
    sequence_length: int,
    cache_dir: Path,
    earlier_train_tokens: Sequence[Mapping[str, int]] = (),
) -> dict[str, Ingest]:
    """What to tokenise for each source in `train_tokens`: at least one training and one held-out sequence. A source
    with fewer than `held_out_tokens` gives what it has. `earlier_train_tokens` are those of shorter budgets that the run had before.
    """
    check_tokenizer(tokenizer)
    least = Need(sequence_length, max(held_out_tokens, sequence_length))
    return {
        name: Ingest(
            name,
            mixture,
            tokenizer,
            replace(
                least,
                train_tokens=max(tokens, least.train_tokens),
                earlier_train_tokens=tuple(max(one[name], least.train_tokens) for one in earlier_train_tokens),
            ),
            cache_dir,
        )
        for name, tokens in train_tokens.items()
    }


def text_documents(documents: Iterator[Document], encoder: Encoder, num_tokens: int) -> ShardDocuments:
    """The first documents that cover `num_tokens`, tokenised in memory without a cache folder."""
    encoded: list[Encoded] = []
    for batch in batches(documents):
        encoded.append(encoder.encode(batch))
        if sum(len(one.ids) for one in encoded) >= num_tokens:
            break
    none = np.empty(0, dtype=np.int64)
    flat = np.concatenate([none.astype(encoder.token_dtype), *(one.ids for one in encoded)])
    lengths = np.concatenate([none, *(one.lengths for one in encoded)])
    lengths = lengths[lengths > 0]
    shard = Shard(flat, None, -lengths)
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
                allowed="Every source needs at least one training and one held-out document.",
                next_step=f"Add documents, or {change} mixture.validation_fraction.",
            )
    return source


class Cleaner:
    """Filters the documents of one source as they are read; can resume after any number of documents.

    Raises:
        MixtureError: If an evaluation file is missing or cannot be read.
        ValueError: If a log is missing. Then the source must be read from its start.
    """

    def __init__(self, mixture: MixtureSection, folder: Path, num_documents: int) -> None:
        self._folder = folder
        self.num_documents = num_documents
        self._decontaminator = Decontaminator.of(mixture)
        self._seen = SeenDocuments(folder, num_documents) if mixture.remove_duplicates else None
        self._log = None
        if self._decontaminator is not None:
            self._log = ContaminationLog(folder, self._decontaminator, num_documents)

    def clean(self, documents: Sequence[Document]) -> list[Document]:
        """Returns the documents to train on. Must be called with every document, in the order of the source."""
        numbered = list(enumerate(documents, start=self.num_documents))
        self.num_documents += len(documents)
        if self._seen is not None:
            new = self._seen.add(documents)
            numbered = [one for one, is_new in zip(numbered, new, strict=True) if is_new]
        if self._decontaminator is None or self._log is None:
            return [document for _, document in numbered]
        kept = []
        overlaps = self._decontaminator.overlaps([document for _, document in numbered])
        for (number, document), overlap in zip(numbered, overlaps, strict=True):
            if overlap is None:
                kept.append(document)
            else:
                self._log.add(document, number, overlap)
        return kept

    def commit(self) -> None:
        """Flushes the logs to disk. Call it before recording elsewhere that these documents were read."""
        if self._seen is not None:
            self._seen.commit()
        if self._log is not None:
            self._log.commit()

    def finish(self, num_documents: int) -> None:
        """Commits, and writes the `ContaminationReport` of the first documents if there are evaluation sets."""
        self.commit()
        report = contamination_report(self._folder, num_documents) if self._log else None
        if report is not None:
            write_text(self._folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")

    def close(self) -> None:
        if self._seen is not None:
            self._seen.close()
        if self._log is not None:
            self._log.close()
