"""Threads that tokenise while Python reads the next documents and writes the previous ones; and their batches.

Documents are grouped in batches, and batches in parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import ParamSpec, TypeVar
from weakref import WeakSet

from sparsify.mixture.sources.documents import Document

THREADS = 2
"""A tokenizer distributes a batch over all cores by itself, outside Python's global lock. The second thread keeps those
cores busy that have finished their part of the first thread's batch."""

MAX_PENDING = 4
"""Tasks in the queue. More than THREADS, so that a thread need not wait until Python has read the next part."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class TokenizerThreads:
    """A thread pool that all sources of a process share, so memory holds two batches whatever the number of sources."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._pending: WeakSet[Future] = WeakSet()

    def submit(
        self,
        work: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Callable[[], Result]:
        """Starts a task; returns a function that waits for its result."""
        future = self._threads.submit(work, *arguments, **named)
        self._pending.add(future)
        return future.result

    @property
    def has_capacity(self) -> bool:
        """Whether fewer than MAX_PENDING tasks are unfinished."""
        return sum(not future.done() for future in list(self._pending)) < MAX_PENDING

    def wait(self) -> None:
        wait(list(self._pending))


def tokenizer_threads() -> TokenizerThreads:
    return _threads_of(os.getpid())


@lru_cache(maxsize=1)
def _threads_of(process_id: int) -> TokenizerThreads:
    # Cached by process id, because a forked process does not inherit its parent's threads.
    return TokenizerThreads()


@dataclass(frozen=True)
class IngestSizes:
    """Sizes of what ingest holds and writes at a time.

    A shard ends at the end of a batch, so the sizes of both decide which documents a shard holds. The size of a part, which
    is one tokenizer task, affects speed only.
    """

    shard_tokens: int = 1 << 23
    """Size at which a shard is closed: large enough to shuffle and pack within, small enough to wait for."""
    batch_documents: int = 256
    batch_characters: int = 1 << 22
    part_documents: int = 64
    part_characters: int = 1 << 18


SIZES = IngestSizes()


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Groups documents in batches that fit in memory whatever the documents' lengths."""
    batch: list[Document] = []
    for part, ends_batch in parts(documents, SIZES):
        batch += part
        if ends_batch:
            yield batch
            batch = []


def parts(documents: Iterator[Document], sizes: IngestSizes) -> Iterator[tuple[list[Document], bool]]:
    """Yields the parts of batches, and whether a part ends its batch. One part is tokenised while the next is read."""
    part: list[Document] = []
    num_documents = num_characters = 0
    part_documents = part_characters = 0
    for document in documents:
        part.append(document)
        num_documents += 1
        num_characters += document.num_characters
        ends_batch = num_documents == sizes.batch_documents or num_characters >= sizes.batch_characters
        if (
            ends_batch
            or num_documents - part_documents == sizes.part_documents
            or num_characters - part_characters >= sizes.part_characters
        ):
            yield part, ends_batch
            part = []
            if ends_batch:
                num_documents = num_characters = 0
            part_documents, part_characters = num_documents, num_characters
    if num_documents:
        yield part, True
