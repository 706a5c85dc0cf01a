"""Peak memory of a piece of work: run in a process of its own, since a process has only one peak."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most memory that this process has held since it began."""
    if STATUS.is_file():
        # Not ru_maxrss: Linux lets a child begin with its parent's peak.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_apart(works: dict[str, tuple[Any, ...]]) -> dict[str, tuple[int, int]]:
    """Runs each work, a function with its arguments, in a fresh process; all at the same time.

    Returns:
        Peak of the process, and what of it the work added to the libraries it had imported, in bytes.
    """
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in works}
    try:
        futures: dict[str, Future[tuple[int, int]]] = {
            name: pool.submit(_measured, *works[name]) for name, pool in pools.items()
        }
        return {name: future.result() for name, future in futures.items()}
    finally:
        for pool in pools.values():
            pool.shutdown()


def _measured(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    before = peak_memory_bytes()  # the function and its imports are here by now
    work(*arguments)
    peak = peak_memory_bytes()
    return peak, peak - before
