"""Measures this machine as a device: reads of a file past the page cache, and the rate at which memory is read.

Where there are kernels, both are theirs: the reading threads of C++, and the product of one token with stored weights, which is slower
than a mere sum of memory where it must widen them.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sparsify.errors import StorageError
from sparsify.files import storage_errors
from sparsify.models.activations import ACTIVATIONS
from sparsify.runtime.build import kernels
from sparsify.runtime.cache_policies import cache_policy
from sparsify.runtime.ffn import sparse_ffn
from sparsify.runtime.file_reads import READING_THREADS, FileReads
from sparsify.runtime.neuron_file import ALIGNMENT
from sparsify.runtime.weights import FfnWeights
from sparsify.simulation.device import Device, Figure, Positive

FILE_BYTES = 256 << 20
LARGE_READ = 1 << 20
SMALL_READ = 4096
"""Unless the size of reads is given."""
SINGLE_READS = 200
SMALL_READS = 8000
MEMORY_BYTES = 512 << 20
REPEATS = 3


@dataclass(frozen=True)
class _Opened:
    path: Path
    descriptor: int


def measure_machine(
    folder: Path,
    tell: Callable[[str], None] = lambda _: None,
    read_bytes: int = SMALL_READ,
    *,
    dtype: torch.dtype = torch.bfloat16,
    hidden: int = 4096,
    slots: int = 14336,
    threads: int | None = None,
) -> Device:
    """A device file of this machine, whose disk is that of a folder. Writes a file of 256 MB there, and removes it.

    Args:
        folder: On that disk.
        tell: Gets lines of progress.
        read_bytes: Of the reads whose rate is measured: those of slots.
        dtype: Of the weights with which the rate of the memory is measured.
        hidden: Of these weights: elements of a row.
        slots: Of a layer, for which places are found.
        threads: Of the kernels; None for torch's number.

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
            bandwidth, rate, latency = _reads(_Opened(path, descriptor), size)
        finally:
            os.close(descriptor)
    finally:
        path.unlink(missing_ok=True)
    tell("Reading memory")
    threads = threads or torch.get_num_threads()
    has_kernels = kernels() is not None
    memory = _product_bandwidth(dtype, hidden, threads, dense=False) if has_kernels else _memory_bandwidth()
    of_slots = _product_bandwidth(dtype, hidden, threads, dense=True) if has_kernels else None
    of_memory = f"{threads} threads, product with {dtype} weights" if has_kernels else "one thread, sum of 512 MB"
    of_kernels = f"measured on this machine, {threads} threads"
    how = f"measured on this machine, {READING_THREADS} threads, reads past the page cache of"
    return Device(
        name="this machine",
        dram_bytes_per_second=Positive(value=memory, source=f"measured on this machine, {of_memory}"),
        flash_bytes_per_second=Positive(value=bandwidth, source=f"{how} 1 MiB"),
        reads_per_second=Positive(value=rate, source=f"{how} {size:,} bytes"),
        read_latency_seconds=Figure(value=latency, source="measured on this machine, median of single reads"),
        page_bytes=Positive(value=ALIGNMENT, source="alignment of reads past the page cache"),
        concurrent=True,
        gathers=has_kernels,
        slot_bytes_per_second=None
        if of_slots is None
        else Positive(value=of_slots, source=f"{of_kernels}, whole blocks"),
        places_seconds=Figure(value=_places_seconds(slots), source=f"{of_kernels}, LFU, a tenth of a layer's slots")
        if has_kernels
        else None,
    )


def _write(path: Path) -> None:
    block = np.random.default_rng(0).bytes(LARGE_READ)
    with path.open("wb") as file:
        for _ in range(FILE_BYTES // LARGE_READ):
            file.write(block)
        os.fsync(file.fileno())


def _reads(file: _Opened, read_bytes: int) -> tuple[float, float, float]:
    """Bytes per second of large reads, small reads per second, seconds of one small read."""
    order = random.Random(0)
    many = _by_kernels if kernels() is not None else _by_threads

    def offsets(size: int, count: int) -> list[int]:
        return [order.randrange(FILE_BYTES // size) * size for _ in range(count)]

    singles = []
    with mmap.mmap(-1, read_bytes) as buffer:
        for offset in offsets(read_bytes, SINGLE_READS):
            start = time.perf_counter()
            os.preadv(file.descriptor, [buffer], offset)
            singles.append(time.perf_counter() - start)
    large = [many(file, offsets(LARGE_READ, FILE_BYTES // LARGE_READ), LARGE_READ) for _ in range(REPEATS)]
    small = [many(file, offsets(read_bytes, SMALL_READS), read_bytes) for _ in range(REPEATS)]
    return (
        FILE_BYTES / statistics.median(large),
        SMALL_READS / statistics.median(small),
        statistics.median(singles),
    )


def _by_kernels(file: _Opened, places: list[int], size: int) -> float:
    """Seconds of reads as the runtime makes them."""
    reads = FileReads(file)
    room = mmap.mmap(-1, READING_THREADS * 4 * size)
    slots = np.frombuffer(room, np.uint8).ctypes.data + np.arange(READING_THREADS * 4) * size
    try:
        start = time.perf_counter()
        addresses = slots[np.arange(len(places)) % len(slots)].astype(np.uintp)
        reads.wait(reads.begin(np.array(places, np.int64), addresses, size))
        return time.perf_counter() - start
    finally:
        reads.close()


def _by_threads(file: _Opened, places: list[int], size: int) -> float:
    def read(some: list[int]) -> None:
        with mmap.mmap(-1, size) as buffer:  # aligned, as reads past the page cache need it
            for offset in some:
                os.preadv(file.descriptor, [buffer], offset)

    start = time.perf_counter()
    with ThreadPoolExecutor(READING_THREADS) as pool:
        list(pool.map(read, (places[number::READING_THREADS] for number in range(READING_THREADS))))
    return time.perf_counter() - start


def _product_bandwidth(dtype: torch.dtype, hidden: int, threads: int, *, dense: bool) -> float:
    """Bytes per second of a block of `MEMORY_BYTES`, for one token: of all its rows, or of those of gate where nothing fires."""
    parts = 3 if dense else 1
    rows = MEMORY_BYTES // (parts * hidden * dtype.itemsize)
    own = [torch.full((rows, hidden), 1 / 64 if dense else -1 / 64, dtype=dtype) for _ in range(parts)]
    weights = FfnWeights(own[0], own[-1], own[parts // 2])
    x = torch.ones(1, hidden, dtype=dtype)
    seconds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        sparse_ffn(x, weights, ACTIVATIONS["drelu"], dense=dense, threads=threads)
        seconds.append(time.perf_counter() - start)
    return parts * own[0].nbytes / statistics.median(seconds[1:])


def _places_seconds(slots: int) -> float:
    random = np.random.default_rng(0)
    cache = cache_policy("lfu", slots, slots // 2)
    seconds = []
    for mask in random.random((40, slots)) < 0.1:
        start = time.perf_counter()
        cache.step(mask)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _memory_bandwidth() -> float:
    values = np.ones(MEMORY_BYTES // 8)
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return MEMORY_BYTES / statistics.median(seconds)
