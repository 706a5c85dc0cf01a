"""Exact duplicates of a source: which of its documents were seen before.

Every document leaves an 8-byte digest in `digests.bin`, at the place of its number; a duplicate leaves a zero. So the
file says what was seen after any number of documents, and a killed ingest goes on by cutting it to the number that it
goes on from. Two different documents among n share a digest with probability n² / 2^65 (one in 3,700 for 100 million);
the price is one document too few.

Looking up is what would need memory. A Bloom filter (B. Bloom, Communications of the ACM 13, 1970) of at most 64 MiB
knows most new documents as new; what it does not know is looked up in sorted files without a name, each merged with the
next of its size (as in P. O'Neil et al., The Log-Structured Merge-Tree, 1996), of which memory holds one digest in 128.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from sparsify.mixture.sources.documents import Document

DIGESTS_FILE = "digests.bin"
RECENT_DIGESTS = 1 << 17
"""Digests that are held in memory until they become a sorted file."""
BLOCK_DIGESTS = 1 << 20
"""Digests that are read from `digests.bin` at a time."""
PAGE_DIGESTS = 128
DIGEST_BYTES = 8
DUPLICATE = 0
FIRST_FILTER_BITS, LAST_FILTER_BITS = 1 << 23, 1 << 29
FILTER_BITS_PER_DIGEST = 10
FILTER_HASHES = 4

Digests = NDArray[np.uint64]


class SeenDocuments:
    """Knows, for every document of a source, whether its content was seen before.

    Give it all documents of the source in their order, also those that are left out for another reason.

    Args:
        folder: Where `digests.bin` is, or will be.
        num_documents: Go on as of the moment when this many documents had been given.

    Raises:
        ValueError: If the file knows of fewer documents. Then the source must be read from its beginning.
    """

    def __init__(self, folder: Path, num_documents: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._log = (folder / DIGESTS_FILE).open("a+b")
        if os.fstat(self._log.fileno()).st_size < num_documents * DIGEST_BYTES:
            self._log.close()
            raise ValueError(f"{folder / DIGESTS_FILE} knows fewer than {num_documents} documents")
        self._log.truncate(num_documents * DIGEST_BYTES)
        self.num_documents = num_documents
        self._recent: set[int] = set()
        self._files: list[_SortedFile] = []
        self._filter = _BloomFilter(num_documents)
        num_new = 0
        for digests in _logged(folder, num_documents):
            new = digests[digests != DUPLICATE]
            num_new += len(new)
            self._filter.add(new)
            self._add_file(iter([np.sort(new)]))
        self.num_duplicates = num_documents - num_new
        """Documents among `num_documents` whose content was seen before."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def add(self, documents: Sequence[Document]) -> NDArray[np.bool_]:
        """Takes in the next documents of the source.

        Returns:
            For each of them, whether its content is new. [len(documents)] bool
        """
        digests = np.fromiter(map(_digest, documents), np.uint64, len(documents))
        if self._filter.is_full(self.num_documents + len(digests)):
            self._log.flush()
            del self._filter  # its memory is free before a larger one is made
            self._filter = _BloomFilter(self.num_documents + len(digests))
            for logged in _logged(self._folder, self.num_documents):
                self._filter.add(logged[logged != DUPLICATE])
        new = np.zeros(len(digests), dtype=np.bool_)
        new[np.unique(digests, return_index=True)[1]] = True
        for place in np.flatnonzero(new & self._filter.may_have(digests)):
            new[place] = not self._has(int(digests[place]))
        self._filter.add(digests[new])
        self._recent.update(digests[new].tolist())
        if len(self._recent) >= RECENT_DIGESTS:
            self._add_file(iter([np.sort(np.fromiter(self._recent, np.uint64))]))
            self._recent.clear()
        self._log.write(np.where(new, digests, np.uint64(DUPLICATE)).tobytes())
        self.num_documents += len(digests)
        self.num_duplicates += len(digests) - int(new.sum())
        return new

    def commit(self) -> None:
        """Puts what was taken in on the disk. Call it before saying elsewhere that these documents were read."""
        self._log.flush()
        os.fsync(self._log.fileno())

    def close(self) -> None:
        """Lets go of the files."""
        self._log.close()
        for file in self._files:
            file.close()

    def _has(self, digest: int) -> bool:
        return digest in self._recent or any(file.has(digest) for file in self._files)

    def _add_file(self, blocks: Iterator[Digests]) -> None:
        file = _SortedFile(self._folder, blocks)
        while self._files and self._files[-1].num_digests < 2 * file.num_digests:
            last = self._files.pop()
            merged = _SortedFile(self._folder, _merged(last.blocks(), file.blocks()))
            last.close()
            file.close()
            file = merged
        self._files.append(file)


def count_duplicates(folder: Path, num_documents: int) -> int | None:
    """Documents among the first `num_documents` of a source whose content an earlier one has; None where none were sought."""
    if not (folder / DIGESTS_FILE).is_file():
        return None
    return sum(
        int(np.count_nonzero(digests == DUPLICATE)) for digests in _logged(folder, num_documents)
    )


def _logged(folder: Path, num_documents: int) -> Iterator[Digests]:
    """What `digests.bin` says of the first documents, block by block: the file may be larger than memory."""
    for start in range(0, num_documents, BLOCK_DIGESTS):
        count = min(BLOCK_DIGESTS, num_documents - start)
        offset = start * DIGEST_BYTES
        yield np.fromfile(folder / DIGESTS_FILE, dtype=np.uint64, count=count, offset=offset)


def _digest(document: Document) -> int:
    hasher = xxhash.xxh3_64()
    if document.token_ids is not None:
        hasher.update(document.token_ids.astype("<u4").tobytes())
    elif document.messages is None:
        hasher.update((document.text or "").encode("utf-8", "surrogatepass"))
    for message in document.messages or ():
        for part in (message["role"], message["content"]):
            encoded = part.encode("utf-8", "surrogatepass")
            # Lengths between the parts, so that text moved from one turn to the next makes another document.
            hasher.update(b"%d\0" % len(encoded))
            hasher.update(encoded)
    return hasher.intdigest() or 1  # 0 stands for a duplicate


class _BloomFilter:
    """Says of a digest that it is new, or that it may have been added before."""

    def __init__(self, num_digests: int) -> None:
        num_bits = FIRST_FILTER_BITS
        while num_digests * FILTER_BITS_PER_DIGEST > num_bits < LAST_FILTER_BITS:
            num_bits *= 2
        self._num_bits = num_bits
        self._bytes = np.zeros(num_bits // 8, dtype=np.uint8)

    def is_full(self, num_digests: int) -> bool:
        """Whether a larger one should take its place for this many digests."""
        return num_digests * FILTER_BITS_PER_DIGEST > self._num_bits < LAST_FILTER_BITS

    def add(self, digests: Digests) -> None:
        for start in range(
            0, len(digests), RECENT_DIGESTS
        ):  # several arrays as long as the digests
            byte, bit = self._places(digests[start : start + RECENT_DIGESTS])
            np.bitwise_or.at(self._bytes, byte, bit)

    def may_have(self, digests: Digests) -> NDArray[np.bool_]:
        byte, bit = self._places(digests)
        return np.logical_and.reduce(self._bytes[byte] & bit)

    def _places(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Byte and bit of each hash. [FILTER_HASHES, len(digests)] each

        All hashes are sums of two halves of the digest (A. Kirsch and M. Mitzenmacher, Less Hashing, Same
        Performance, 2006).
        """
        step = (digests & np.uint64(0xFFFFFFFF)) | np.uint64(1)
        times = np.arange(FILTER_HASHES, dtype=np.uint64)[:, None]
        places = ((digests >> np.uint64(32)) + times * step).astype(np.int64) % self._num_bits
        return places >> 3, np.left_shift(1, places & 7).astype(np.uint8)


class _SortedFile:
    """Sorted digests in a file that vanishes with this process."""

    def __init__(self, folder: Path, blocks: Iterator[Digests]) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (close() closes it)
        self._first_of_page = array("Q")
        self.num_digests = 0
        for block in blocks:
            self._file.write(block.tobytes())
            first = -self.num_digests % PAGE_DIGESTS
            self._first_of_page.frombytes(block[first::PAGE_DIGESTS].tobytes())
            self.num_digests += len(block)

    def has(self, digest: int) -> bool:
        page = bisect_right(self._first_of_page, digest) - 1
        if page < 0:
            return False
        page_bytes = PAGE_DIGESTS * DIGEST_BYTES
        read = os.pread(self._file.fileno(), page_bytes, page * page_bytes)
        digests = memoryview(read).cast("Q")
        place = bisect_left(digests, digest)
        return place < len(digests) and digests[place] == digest

    def blocks(self) -> Iterator[Digests]:
        for start in range(0, self.num_digests, RECENT_DIGESTS):
            read = os.pread(
                self._file.fileno(), RECENT_DIGESTS * DIGEST_BYTES, start * DIGEST_BYTES
            )
            yield np.frombuffer(read, dtype=np.uint64)

    def close(self) -> None:
        self._file.close()


def _merged(left: Iterator[Digests], right: Iterator[Digests]) -> Iterator[Digests]:
    """Two sorted sequences of blocks as one."""
    empty = np.empty(0, dtype=np.uint64)
    a, b = next(left, empty), next(right, empty)
    while len(a) and len(b):
        bound = min(a[-1], b[-1])
        taken_a, taken_b = (int(np.searchsorted(block, bound, side="right")) for block in (a, b))
        # A stable sort merges what is in order already.
        yield np.sort(np.concatenate([a[:taken_a], b[:taken_b]]), kind="stable")
        a = a[taken_a:] if taken_a < len(a) else next(left, empty)
        b = b[taken_b:] if taken_b < len(b) else next(right, empty)
    yield from (rest for rest in chain([a, b], left, right) if len(rest))
