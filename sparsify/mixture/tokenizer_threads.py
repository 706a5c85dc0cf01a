"""Threads in which texts are tokenised, while Python reads the next ones and writes those before."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from typing import ParamSpec, TypeVar
from weakref import WeakSet

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
