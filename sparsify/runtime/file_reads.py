"""Reads of a file by C++ threads, while others compute: what `native/reads.h` does, and rows that pass through a ring of chunks."""

from __future__ import annotations

import ctypes
import errno
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import StorageError
from sparsify.runtime.build import kernels

READING_THREADS = 16
"""As many reads of one neuron each (16 KB) were under way at once where more gained nothing."""
END_OF_FILE = -1
"""As in native/reads.h; other errors are errno."""


@dataclass
class NeuronReads:
    """What decoding steps needed of the neurons that memory does not hold for good, added up.

    Attributes:
        needed: Neurons whose rows were needed.
        hits: Of these, those that were in memory.
        ahead: Of the others, those that had been requested before they were needed.
        over_fetched: Neurons that were requested ahead and not needed.
        unit_bytes: Bytes of neurons' units that were read, those ahead of their use included.
        streamed_bytes: Bytes of rows that steps read in full and memory does not hold.
        stall_bytes: Bytes of units that were not requested before a step needed them.
        wait_seconds: Time for which steps waited for reads.
    """

    needed: int = 0
    hits: int = 0
    ahead: int = 0
    over_fetched: int = 0
    unit_bytes: int = 0
    streamed_bytes: int = 0
    stall_bytes: int = 0
    wait_seconds: float = 0.0

    @property
    def hit_rate(self) -> float:
        """Share of the needed neurons that were in memory; 1 if none was needed."""
        return self.hits / self.needed if self.needed else 1.0

    @property
    def bytes_read(self) -> int:
        return self.unit_bytes + self.streamed_bytes

    def __add__(self, other: NeuronReads) -> NeuronReads:
        return NeuronReads(*(getattr(self, one.name) + getattr(other, one.name) for one in fields(self)))

    def __sub__(self, other: NeuronReads) -> NeuronReads:
        return NeuronReads(*(getattr(self, one.name) - getattr(other, one.name) for one in fields(self)))


class OpenFile(Protocol):
    """A file that is open for reading."""

    @property
    def path(self) -> Path: ...

    @property
    def descriptor(self) -> int: ...


class FileReads:
    """Reads of a file, of neurons as a rule.

    Args:
        file: It, open as long as this.
        threads: How many reads are under way at once.
    """

    def __init__(self, file: OpenFile, threads: int = READING_THREADS) -> None:
        library = kernels()
        assert library is not None, "the caller checks native_can"
        self.file, self._library = file, library
        self._process = os.getpid()
        self.handle = ctypes.c_void_p(library.sparsify_reader_open(file.descriptor, threads))

    def begin(
        self, offsets: NDArray[np.int64], addresses: NDArray[np.uintp], num_bytes: int, *, ahead: bool = False
    ) -> int:
        """Begins reads of so many bytes each, from offsets of the file to addresses, needed now or ahead of their use; returns
        a ticket.
        """
        offsets, addresses = np.ascontiguousarray(offsets), np.ascontiguousarray(addresses)
        assert offsets.dtype == np.int64
        assert addresses.dtype == np.uintp
        return self._library.sparsify_reader_submit(
            self.handle,
            offsets.ctypes.data_as(ctypes.c_void_p),
            addresses.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(offsets)),
            ctypes.c_int64(num_bytes),
            ctypes.c_int(ahead),
        )

    def wait(self, ticket: int) -> None:
        """Waits for the reads of a ticket. Raises StorageError if one failed."""
        if os.getpid() != self._process:
            raise RuntimeError("The threads that read the neuron file belong to the process that forked this one.")
        code = self._library.sparsify_reader_wait(self.handle, ctypes.c_int64(ticket))
        if code:
            raise self.failure(code)

    def failure(self, code: int) -> StorageError:
        """What the user must know of an error of C++."""
        path = self.file.path
        if code == END_OF_FILE:
            return StorageError(
                f"{path} was truncated while it was read.",
                next_step="Nothing else was changed. Run the same command again: the file is written again.",
            )
        reason = "the disk reports an error" if code == errno.EIO else os.strerror(code)
        return StorageError(
            f"{path} cannot be read: {reason}.",
            next_step="Check the disk or the mount. If it is well, remove this file and run the same command again.",
        )

    def close(self) -> None:
        if self.handle and os.getpid() == self._process:
            self._library.sparsify_reader_close(self.handle)
        self.handle = ctypes.c_void_p()


class RowStream:
    """Rows that every step reads from the file, through a ring of chunks.

    Args:
        reads: Of the file.
        ring: Address of the chunks, aligned for direct reads.
        chunks: Their number.
        chunk_bytes: Room of one.
        chunk_rows: Rows that it holds.
        row_bytes: Bytes of one row.
        alignment: Of reads.
    """

    def __init__(
        self,
        reads: FileReads,
        ring: int,
        chunks: int,
        chunk_bytes: int,
        chunk_rows: int,
        row_bytes: int,
        alignment: int,
    ) -> None:
        library = kernels()
        assert library is not None
        self._library, self._reads = library, reads
        numbers = map(ctypes.c_int64, (chunks, chunk_bytes, chunk_rows, row_bytes, alignment))
        self.handle = ctypes.c_void_p(library.sparsify_stream_open(reads.handle, ctypes.c_void_p(ring), *numbers))

    def discard(self) -> None:
        """Forgets what was read ahead: the ring is free."""
        self._library.sparsify_stream_discard(self.handle)

    def counts(self) -> tuple[int, float]:
        """Bytes streamed so far, and seconds that steps waited for them."""
        waited = ctypes.c_double()
        read = self._library.sparsify_stream_bytes(self.handle, ctypes.byref(waited))
        return int(read), waited.value

    def close(self) -> None:
        if self.handle:
            self.discard()
            self._library.sparsify_stream_close(self.handle)
        self.handle = ctypes.c_void_p()
