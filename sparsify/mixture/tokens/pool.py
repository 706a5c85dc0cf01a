"""Threads in which texts are tokenised, while Python reads the next ones and writes those before.

Documents in batches, and batches in parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import ParamSpec, TypeVar
from weakref import WeakSet

from sparsify.mixture.sources.documents import Document

THREADS = 2
"""A tokenizer spreads a batch over all cores by itself, outside Python's lock. The second thread gives it work for the
cores that have nothing left to do of the first one's batch."""

MAX_BEGUN = 4
"""Some wait, so that a thread need not wait for Python to read the next."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class TokenizerThreads:
    """Few, and all sources of a process share them: so memory holds what two batches need, however many sources."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tokenize")
        self._begun: WeakSet[Future] = WeakSet()

    def submit(
        self,
        work: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **named: Arguments.kwargs,
    ) -> Callable[[], Result]:
        """Begins some work; returns what waits for its result."""
        future = self._threads.submit(work, *arguments, **named)
        self._begun.add(future)
        return future.result

    @property
    def have_room(self) -> bool:
        """Whether little enough is under way that more may be begun."""
        return sum(not future.done() for future in list(self._begun)) < MAX_BEGUN

    def wait(self) -> None:
        """Waits until all that was begun is done."""
        wait(list(self._begun))


def tokenizer_threads() -> TokenizerThreads:
    """Those of this process."""
    return _threads_of(os.getpid())


@lru_cache(maxsize=1)
def _threads_of(process_id: int) -> TokenizerThreads:
    # A forked process has none of its parent's threads.
    return TokenizerThreads()


BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 22
"""Whichever comes first ends a batch. A shard ends with a batch, so its documents depend on them."""
PART_DOCUMENTS, PART_CHARACTERS = 64, 1 << 18
"""The same of a part of a batch, which is tokenised at once; nothing depends on them but speed."""


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches small enough for memory, whatever the length of documents."""
    batch: list[Document] = []
    for part, ends_batch in parts(documents):
        batch += part
        if ends_batch:
            yield batch
            batch = []


def parts(documents: Iterator[Document]) -> Iterator[tuple[list[Document], bool]]:
    """Batches in parts, and whether a part ends its batch: the first is tokenised while the second is read."""
    part: list[Document] = []
    num_documents = num_characters = 0
    part_documents = part_characters = 0
    for document in documents:
        part.append(document)
        num_documents += 1
        num_characters += document.num_characters
        ends_batch = num_documents == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS
        if (
            ends_batch
            or num_documents - part_documents == PART_DOCUMENTS
            or num_characters - part_characters >= PART_CHARACTERS
        ):
            yield part, ends_batch
            part = []
            if ends_batch:
                num_documents = num_characters = 0
            part_documents, part_characters = num_documents, num_characters
    if num_documents:
        yield part, True
