"""Measures this machine as a device: reads of a file past the page cache, and the rate at which memory is read."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sparsify.errors import StorageError
from sparsify.files import storage_errors
from sparsify.simulation.device import Device, Figure, Positive

FILE_BYTES = 256 << 20
ALIGNMENT = 512
"""Of reads past the page cache."""
LARGE_READ = 1 << 20
SMALL_READ = 4096
"""Unless the size of reads is given."""
THREADS = 16
SINGLE_READS = 200
SMALL_READS = 4000
MEMORY_BYTES = 512 << 20
REPEATS = 3


def measure_machine(folder: Path, tell: Callable[[str], None] = lambda _: None, read_bytes: int = SMALL_READ) -> Device:
    """A device file of this machine, whose disk is that of a folder. Writes a file of 256 MB there, and removes it.

    Args:
        folder: On that disk.
        tell: Gets lines of progress.
        read_bytes: Of the reads whose rate is measured: those of slots.

    Raises:
        StorageError: If there is no such folder, the file cannot be written, or the file system has no reads past the page cache.
    """
    if not folder.is_dir():
        raise StorageError(
            f"{folder} is not a folder.", next_step="Give a folder on the disk that is measured (--disk)."
        )
    path = folder / f".sparsify-reads-{os.getpid()}"
    size = -(-read_bytes // ALIGNMENT) * ALIGNMENT
    try:
        with storage_errors(path):
            tell("Writing the file that is read")
            _write(path)
        tell("Reading it past the page cache")
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            raise StorageError(
                f"{folder} is on a file system without reads past the page cache.",
                next_step="Give a folder on the disk that models will be read from (--disk).",
            ) from error
        try:
            bandwidth, rate, latency = _reads(descriptor, size)
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    tell("Reading memory")
    memory = _memory_bandwidth()
    how = f"measured on this machine, {THREADS} threads, reads past the page cache of"
    return Device(
        name="this machine",
        dram_bytes_per_second=Positive(value=memory, source="measured on this machine, one thread, sum of 512 MB"),
        flash_bytes_per_second=Positive(value=bandwidth, source=f"{how} 1 MiB"),
        reads_per_second=Positive(value=rate, source=f"{how} {size:,} bytes"),
        read_latency_seconds=Figure(value=latency, source="measured on this machine, median of single reads"),
        page_bytes=Positive(value=ALIGNMENT, source="alignment of reads past the page cache"),
        concurrent=True,
    )


def _write(path: Path) -> None:
    block = np.random.default_rng(0).bytes(LARGE_READ)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // LARGE_READ):
            file.write(block)
        os.fsync(file.fileno())


def _reads(descriptor: int, read_bytes: int) -> tuple[float, float, float]:
    """Bytes per second of large reads, small reads per second, seconds of one small read."""
    order = random.Random(0)

    def offsets(size: int, count: int) -> list[int]:
        return [order.randrange(FILE_BYTES // size) * size for _ in range(count)]

    def many(places: list[int], size: int) -> float:
        def read(some: list[int]) -> None:
            with mmap.mmap(-1, size) as buffer:  # aligned, as reads past the page cache need it
                for offset in some:
                    os.preadv(descriptor, [buffer], offset)

        start = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(read, (places[number::THREADS] for number in range(THREADS))))
        return time.perf_counter() - start

    singles = []
    with mmap.mmap(-1, read_bytes) as buffer:
        for offset in offsets(read_bytes, SINGLE_READS):
            start = time.perf_counter()
            os.preadv(descriptor, [buffer], offset)
            singles.append(time.perf_counter() - start)
    large = [many(offsets(LARGE_READ, FILE_BYTES // LARGE_READ), LARGE_READ) for _ in range(REPEATS)]
    small = [many(offsets(read_bytes, SMALL_READS), read_bytes) for _ in range(REPEATS)]
    return (
        FILE_BYTES / statistics.median(large),
        SMALL_READS / statistics.median(small),
        statistics.median(singles),
    )


def _memory_bandwidth() -> float:
    values = np.ones(MEMORY_BYTES // 8)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return MEMORY_BYTES / statistics.median(seconds)
