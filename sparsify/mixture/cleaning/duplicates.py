"""Detects exact duplicates in a source.

Entry n of `digests.bin` is the 8-byte digest of document n, or zero if the document is a duplicate. So a prefix of the
file is the state after any number of documents, and a killed ingest resumes by truncating the file. Two different
documents among n share a digest with probability n² / 2^65 (one in 3,700 for 100 million); then one document too many
is dropped.

A lookup must not need all digests in memory. A Bloom filter (B. Bloom, Communications of the ACM 13, 1970) of at most
64 MiB recognises most new documents as new. The remaining ones are looked up in sorted temporary files, which are
merged with files of similar size (as in P. O'Neil et al., The Log-Structured Merge-Tree, 1996); memory holds one digest
in 128 of them.

Measured against sqlite3 3.40 (`INSERT OR IGNORE` of sorted digests, journal and synchronous off, cache of 64 MiB) with 5%
duplicates, in documents per second of CPU time. This module, in batches of 1,024: 655,000 at 10 million documents and
between 410,000 and 700,000 from there to 97 million, with a peak memory of 151 MB. sqlite3 in batches of 1,024: 114,000
at 10 million with the digest as rowid, and 139,000 at 3 million as key of a table without rowid. In batches of 131,072 it
reached 350,000 at 10 million and 234,000 at 18 million, and falls further as the table outgrows its cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from sparsify.mixture.sources.documents import Document, message_text

DIGESTS_FILE = "digests.bin"
DIGEST_BYTES = 8
DUPLICATE = 0
FILTER_BITS_PER_DIGEST = 10
FILTER_HASHES = 4

Digests = NDArray[np.uint64]


@dataclass(frozen=True)
class DigestSizes:
    """Sizes of what finds a digest among the earlier ones; they affect speed and memory only."""

    recent: int = 1 << 17
    """Digests to collect in memory before they become a sorted file."""
    block: int = 1 << 20
    """Digests to read from `digests.bin` at a time."""
    page: int = 128
    """Digests of a sorted file of which memory holds the first."""
    first_filter_bits: int = 1 << 23
    last_filter_bits: int = 1 << 29


SIZES = DigestSizes()


class SeenDocuments:
    """The contents of all documents of a source so far.

    Must be given every document of the source in order, including those that are dropped for another reason.

    Raises:
        ValueError: If the file has fewer documents. Then the source must be read from its start.
    """

    def __init__(self, folder: Path, num_documents: int = 0, sizes: DigestSizes = SIZES) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._sizes = folder, sizes
        self._log = (folder / DIGESTS_FILE).open("a+b")
        if os.fstat(self._log.fileno()).st_size < num_documents * DIGEST_BYTES:
            self._log.close()
            raise ValueError(f"{folder / DIGESTS_FILE} knows fewer than {num_documents} documents")
        self._log.truncate(num_documents * DIGEST_BYTES)
        self.num_documents = num_documents
        self._recent: set[int] = set()
        self._files: list[_SortedFile] = []
        self._filter = _BloomFilter(num_documents, sizes)
        for digests in _logged(folder, num_documents, sizes.block):
            new = digests[digests != DUPLICATE]
            self._filter.add(new)
            self._add_file(iter([np.sort(new)]))

    def add(self, documents: Sequence[Document]) -> NDArray[np.bool_]:
        """Whether the content of each of the source's next documents is new, bool [len(documents)]."""
        digests = np.fromiter(map(_digest, documents), np.uint64, len(documents))
        if self._filter.is_full(self.num_documents + len(digests)):
            self._log.flush()
            del self._filter  # frees its memory before the larger one is allocated
            self._filter = _BloomFilter(self.num_documents + len(digests), self._sizes)
            for logged in _logged(self._folder, self.num_documents, self._sizes.block):
                self._filter.add(logged[logged != DUPLICATE])
        # New are those that occur first in this batch, and that neither the filter nor the files know.
        new = np.zeros(len(digests), dtype=np.bool_)
        new[np.unique(digests, return_index=True)[1]] = True
        for place in np.flatnonzero(new & self._filter.may_have(digests)):
            new[place] = not self._has(int(digests[place]))
        self._filter.add(digests[new])
        self._recent.update(digests[new].tolist())
        if len(self._recent) >= self._sizes.recent:
            self._add_file(iter([np.sort(np.fromiter(self._recent, np.uint64))]))
            self._recent.clear()
        self._log.write(np.where(new, digests, np.uint64(DUPLICATE)).tobytes())
        self.num_documents += len(digests)
        return new

    def commit(self) -> None:
        """Flushes the digests to disk. Call it before recording elsewhere that these documents were read."""
        self._log.flush()
        os.fsync(self._log.fileno())

    def close(self) -> None:
        self._log.close()
        for file in self._files:
            file.close()

    def _has(self, digest: int) -> bool:
        return digest in self._recent or any(file.has(digest) for file in self._files)

    def _add_file(self, blocks: Iterator[Digests]) -> None:
        file = _SortedFile(self._folder, blocks, self._sizes)
        # Invariant: each file has at least twice as many digests as the next one. So there are at most
        # log2(n / sizes.recent) files to search, and each digest is rewritten at most that many times. The new file
        # is the smallest: merge it with the last one, and the result with the one before, until the invariant holds.
        while self._files and self._files[-1].num_digests < 2 * file.num_digests:
            last = self._files.pop()
            merged = _SortedFile(self._folder, _merged(last.blocks(), file.blocks()), self._sizes)
            last.close()
            file.close()
            file = merged
        self._files.append(file)


def count_duplicates(folder: Path, num_documents: int) -> int | None:
    """Duplicates among the first `num_documents` of a source; None if the source was not checked for them."""
    if not (folder / DIGESTS_FILE).is_file():
        return None
    blocks = _logged(folder, num_documents, SIZES.block)
    return sum(int(np.count_nonzero(digests == DUPLICATE)) for digests in blocks)


def _logged(folder: Path, num_documents: int, block_digests: int) -> Iterator[Digests]:
    """Digests of the first documents in blocks: the file may be larger than memory."""
    for start in range(0, num_documents, block_digests):
        count = min(block_digests, num_documents - start)
        offset = start * DIGEST_BYTES
        yield np.fromfile(folder / DIGESTS_FILE, dtype=np.uint64, count=count, offset=offset)


def _digest(document: Document) -> int:
    hasher = xxhash.xxh3_64()
    if document.token_ids is not None:
        hasher.update(document.token_ids.astype("<u4").tobytes())
    elif document.messages is None:
        hasher.update((document.text or "").encode("utf-8", "surrogatepass"))
    parts = [part for message in document.messages or () for part in (message["role"], message_text(message))]
    if document.tools:
        parts.append(json.dumps(document.tools, sort_keys=True))
    for part in parts:
        encoded = part.encode("utf-8", "surrogatepass")
        # Hash the lengths too, so that moving text from one turn to the next changes the digest.
        hasher.update(b"%d\0" % len(encoded))
        hasher.update(encoded)
    return hasher.intdigest() or 1  # 0 marks a duplicate


class _BloomFilter:
    """A set of digests that may report false positives, but no false negatives."""

    def __init__(self, num_digests: int, sizes: DigestSizes) -> None:
        num_bits = sizes.first_filter_bits
        while num_digests * FILTER_BITS_PER_DIGEST > num_bits < sizes.last_filter_bits:
            num_bits *= 2
        self._num_bits, self._sizes = num_bits, sizes
        self._bytes = np.zeros(num_bits // 8, dtype=np.uint8)

    def is_full(self, num_digests: int) -> bool:
        """Whether a larger filter should replace this one for `num_digests` digests."""
        return num_digests * FILTER_BITS_PER_DIGEST > self._num_bits < self._sizes.last_filter_bits

    def add(self, digests: Digests) -> None:
        # In blocks, because several temporary arrays are as long as the digests.
        for start in range(0, len(digests), self._sizes.recent):
            byte, bit = self._places(digests[start : start + self._sizes.recent])
            np.bitwise_or.at(self._bytes, byte, bit)

    def may_have(self, digests: Digests) -> NDArray[np.bool_]:
        byte, bit = self._places(digests)
        return np.logical_and.reduce(self._bytes[byte] & bit)

    def _places(self, digests: Digests) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Byte and bit of each hash. [FILTER_HASHES, len(digests)] each

        Hash i is high half + i * low half of the digest (A. Kirsch and M. Mitzenmacher, Less Hashing, Same
        Performance, 2006).
        """
        step = (digests & np.uint64(0xFFFFFFFF)) | np.uint64(1)
        times = np.arange(FILTER_HASHES, dtype=np.uint64)[:, None]
        places = ((digests >> np.uint64(32)) + times * step).astype(np.int64) % self._num_bits
        return places >> 3, np.left_shift(1, places & 7).astype(np.uint8)


class _SortedFile:
    """Sorted digests in a temporary file. Memory holds the first digest of every page."""

    def __init__(self, folder: Path, blocks: Iterator[Digests], sizes: DigestSizes) -> None:
        self._sizes = sizes
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (close() closes it)
        self._first_of_page = array("Q")
        self.num_digests = 0
        for block in blocks:
            self._file.write(block.tobytes())
            first = -self.num_digests % sizes.page
            self._first_of_page.frombytes(block[first :: sizes.page].tobytes())
            self.num_digests += len(block)

    def has(self, digest: int) -> bool:
        page = bisect_right(self._first_of_page, digest) - 1
        if page < 0:
            return False
        page_bytes = self._sizes.page * DIGEST_BYTES
        read = os.pread(self._file.fileno(), page_bytes, page * page_bytes)
        digests = memoryview(read).cast("Q")
        place = bisect_left(digests, digest)
        return place < len(digests) and digests[place] == digest

    def blocks(self) -> Iterator[Digests]:
        for start in range(0, self.num_digests, self._sizes.recent):
            read = os.pread(self._file.fileno(), self._sizes.recent * DIGEST_BYTES, start * DIGEST_BYTES)
            yield np.frombuffer(read, dtype=np.uint64)

    def close(self) -> None:
        self._file.close()


def _merged(left: Iterator[Digests], right: Iterator[Digests]) -> Iterator[Digests]:
    """Merges two sorted sequences of blocks."""
    empty = np.empty(0, dtype=np.uint64)
    a, b = next(left, empty), next(right, empty)
    while len(a) and len(b):
        # Everything up to the smaller of the two last digests is complete: no later block holds more of it.
        bound = min(a[-1], b[-1])
        taken_a, taken_b = (int(np.searchsorted(block, bound, side="right")) for block in (a, b))
        # A stable sort of two sorted runs is a merge.
        yield np.sort(np.concatenate([a[:taken_a], b[:taken_b]]), kind="stable")
        a = a[taken_a:] if taken_a < len(a) else next(left, empty)
        b = b[taken_b:] if taken_b < len(b) else next(right, empty)
    yield from (rest for rest in chain([a, b], left, right) if len(rest))
