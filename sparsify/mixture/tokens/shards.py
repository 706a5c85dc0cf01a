"""The files of a tokenised source: shards of whole documents, which can be read as soon as they are written.

    cache_dir/<fingerprint>/
      source.json             dtype, loss mask, tokenizer; written first
      tokens-00000.bin …      the concatenated documents of a shard, uint16 or uint32
      loss-00000.bin …        instruction sources only: 1 if a token carries loss as a target
      documents-00000.bin …   length of each document as int64, negative if it is held out of training
      shards.jsonl            one line per finished shard with the hashes of its files, appended after they are on disk

A line with `"closed": true` never changes, so a reader may follow the file while it grows. Ingest ends with a line that
is not closed: the shard that was unfinished when the need was met. A later ingest writes that shard again and continues
from there; so does an ingest whose predecessor was killed.

A shard is compared with its hashes when it is opened, once in a process: `verify` before a run starts, so that ingest
writes what is damaged again, and `shard` in every process that reads it.

Fingerprint of a source: a hash of everything its tokens depend on. It names the source's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sparsify.errors import MixtureError
from sparsify.files import storage_errors, sync_folder, write_text
from sparsify.mixture.cleaning.decontaminate import decontamination_fingerprint
from sparsify.mixture.sources.source_files import SourceFile, source_files
from sparsify.mixture.sources.stdlib_text import module_paths
from sparsify.mixture.tokens.chat_template import chat_template_text
from sparsify.mixture.tokens.encoder import Tokenizer, tokenizer_fingerprint
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection

SHARDS_FILE, SOURCE_FILE = "shards.jsonl", "source.json"
OPEN_SHARDS = 4
HASHING_THREADS = 4

IntArray = NDArray[np.int64]
logger = logging.getLogger(__name__)


class SourceInfo(BaseModel):
    token_dtype: str
    has_loss_mask: bool
    tokenizer: str
    """Fingerprint of the tokenizer."""
    chat_template: str | None = None
    """The Jinja text that rendered the conversations; None for a pretraining source."""
    end_token: int
    """Id of the end-of-sequence token, which also fills the empty positions of a packed sequence."""


class ShardRecord(BaseModel):
    num_documents: int
    train_tokens: int
    held_out_tokens: int
    read_documents: int
    """Documents of the source that were read when the shard ended, including those that were dropped."""
    closed: bool
    """Whether the shard is full and will not change."""
    hashes: dict[str, str]
    """xxh3_128 of the tokens, the loss mask and the lengths of the documents, each as far as this line covers it."""
    complete: bool = False
    """Whether the source ends with this shard."""


@dataclass(frozen=True)
class Shard:
    """One opened shard.

    Attributes:
        tokens: The concatenated documents, memory-mapped. [T]
        loss: Which tokens carry loss as a target; None if all do. [T] uint8
        signed: Number of tokens of each document, negative if it is held out of training. [D] int64
    """

    tokens: NDArray[Any]
    loss: NDArray[np.uint8] | None
    signed: IntArray

    @cached_property
    def lengths(self) -> IntArray:
        """Number of tokens of each document. [D] int64"""
        return np.abs(self.signed)

    @property
    def held_out(self) -> NDArray[np.bool_]:
        """Which documents are held out of training. [D] bool"""
        return self.signed < 0

    @property
    def starts(self) -> IntArray:
        """Offset of each document's first token. [D] int64"""
        return np.cumsum(self.lengths) - self.lengths


class SourceCache:
    """Reads a cache folder, even while another process writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: list[ShardRecord] = []
        self._closed_bytes = 0
        self.shard = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)

    @property
    def info(self) -> SourceInfo | None:
        try:
            return SourceInfo.model_validate_json(_read(self.folder / SOURCE_FILE))
        except (FileNotFoundError, ValidationError):
            return None

    @property
    def num_closed(self) -> int:
        return len(self.records) - bool(self.records and not self.records[-1].closed)

    @property
    def complete(self) -> bool:
        return bool(self.records and self.records[-1].complete)

    def refresh(self) -> None:
        """Loads the shards that were finished since the last call, up to the first damaged one."""
        if self.info is None:
            return
        try:
            lines = _read(self.folder / SHARDS_FILE, self._closed_bytes).splitlines(keepends=True)
        except FileNotFoundError:
            return
        info = self.info
        assert info is not None
        del self.records[self.num_closed :]
        for line in lines:
            try:
                record = ShardRecord.model_validate_json(line)
            except ValidationError:  # an incomplete line: being written, or left by a killed process
                break
            if not self._is_intact(len(self.records), record, info):
                break
            self.records.append(record)
            if record.closed:
                self._closed_bytes += len(line)
        self.shard.cache_clear()

    def _is_intact(self, number: int, record: ShardRecord, info: SourceInfo) -> bool:
        """Whether a shard's files are as long as its line says. A full disk or manual edits leave truncated files."""
        num_tokens = record.train_tokens + record.held_out_tokens
        sizes = {
            f"tokens-{number:05d}.bin": num_tokens * np.dtype(info.token_dtype).itemsize,
            f"documents-{number:05d}.bin": record.num_documents * 8,
        }
        if info.has_loss_mask:
            sizes[f"loss-{number:05d}.bin"] = num_tokens
        states = (_state(self.folder / name) for name in sizes)
        return all(state and state.num_bytes >= size for state, size in zip(states, sizes.values(), strict=True))

    def verify(self, num_shards: int) -> None:
        """Compares the first shards with their hashes, and forgets the first damaged one and those after it."""
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            damaged = list(pool.map(self._damaged_file, range(num_shards)))
        first = next((number for number, name in enumerate(damaged) if name is not None), None)
        if first is not None:
            logger.warning(f"{self.folder / str(damaged[first])} is not as it was written; it is tokenised again.")
            del self.records[first:]

    def _damaged_file(self, number: int) -> str | None:
        """Name of a file of a shard that does not have its hash."""
        hashes = self.records[number].hashes
        names = [f"{kind}-{number:05d}.bin" for kind in hashes]
        state = tuple(_state(self.folder / name) for name in names)
        if state in _intact:
            return None
        shard = self._mapped_shard(number)
        values = {"tokens": shard.tokens, "loss": shard.loss, "documents": shard.signed}
        for name, (kind, digest) in zip(names, hashes.items(), strict=True):
            held = values[kind]
            if held is None or _hash(held) != digest:
                return name
        _intact.add(state)
        return None

    def _open_shard(self, number: int) -> Shard:
        damaged = self._damaged_file(number)
        if damaged is not None:
            raise MixtureError(
                f"{self.folder / damaged} is not as it was written.",
                next_step="Run the same command again: it tokenises this part again. If that happens often, check the "
                "disk and the memory of this machine.",
            )
        return self._mapped_shard(number)

    def _mapped_shard(self, number: int) -> Shard:
        info, record = self.info, self.records[number]
        assert info is not None
        # An unfinished shard may have grown since its line was read: use only what the line covers.
        size = record.train_tokens + record.held_out_tokens
        signed = _mapped(self.folder / f"documents-{number:05d}.bin", "int64", record.num_documents)
        tokens = _mapped(self.folder / f"tokens-{number:05d}.bin", info.token_dtype, size)
        loss = None
        if info.has_loss_mask:
            loss = _mapped(self.folder / f"loss-{number:05d}.bin", "uint8", size)
        return Shard(tokens, loss, signed)


class _FileState(NamedTuple):
    device: int
    inode: int
    num_bytes: int
    modified_ns: int


_intact: set[tuple[_FileState | None, ...]] = set()
"""States of the files of shards that this process has compared with their hashes."""


def _state(path: Path) -> _FileState | None:
    with storage_errors(path, "read"):
        try:
            found = path.stat()
        except FileNotFoundError:
            return None
    return _FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def _hash(values: NDArray[Any]) -> str:
    hasher = xxhash.xxh3_128()
    if len(values):  # numpy gives no buffer of an empty array
        hasher.update(values.data)
    return hasher.hexdigest()


def _read(path: Path, start: int = 0) -> bytes:
    """What a small file holds. Raises FileNotFoundError if it is not there, StorageError if the disk fails."""
    if not path.is_file():
        raise FileNotFoundError(path)
    with storage_errors(path, "read"), path.open("rb") as file:
        file.seek(start)
        return file.read()


def _mapped(path: Path, dtype: str, size: int) -> NDArray[Any]:
    if not size:
        return np.empty(0, dtype=dtype)
    # A plain array over the mapping: indexing is slower in the memmap class.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(size,)))


class ShardWriter:
    """Appends documents to a cache folder. The caller must hold the folder's lock.

    Args:
        folder: The cache folder. Closed shards are kept, an unclosed one is written again.
    """

    def __init__(self, folder: Path, info: SourceInfo, shard_tokens: int) -> None:
        self.folder, self.info, self._shard_tokens = folder, info, shard_tokens
        folder.mkdir(parents=True, exist_ok=True)
        cache = SourceCache(folder)
        cache.refresh()
        cache.verify(cache.num_closed)
        self.records = cache.records[: cache.num_closed]
        self.read_documents = self.records[-1].read_documents if self.records else 0
        """Documents of the source that have been read: where ingest resumes."""
        if cache.info == info:
            self._forget_open_shard()
            self._begin_shard()
        else:
            self.clear()

    def clear(self) -> None:
        for leftover in self.folder.iterdir():
            leftover.unlink()
        self.records, self.read_documents = [], 0
        write_text(self.folder / SOURCE_FILE, self.info.model_dump_json(indent=2) + "\n")
        self._forget_open_shard()
        self._begin_shard()

    @property
    def train_tokens(self) -> int:
        return sum(record.train_tokens for record in self.records) + self._train_tokens

    @property
    def held_out_tokens(self) -> int:
        return sum(record.held_out_tokens for record in self.records) + self._held_out_tokens

    def add(
        self,
        ids: NDArray[Any],
        carries_loss: NDArray[np.bool_] | None,
        lengths: IntArray,
        held_out: NDArray[np.bool_],
    ) -> None:
        """Appends documents: their concatenated tokens [T], loss mask [T] if the source has one, lengths [D] and
        held-out flags [D].
        """
        self._append("tokens", self._tokens, np.ascontiguousarray(ids))
        if self._loss is not None:
            assert carries_loss is not None
            self._append("loss", self._loss, carries_loss.astype(np.uint8))
        self._signed.append(np.where(held_out, -lengths, lengths))
        self._held_out_tokens += int(lengths[held_out].sum())
        self._train_tokens += int(lengths[~held_out].sum())
        if self._train_tokens + self._held_out_tokens >= self._shard_tokens:
            self.shard_is_full = True

    def _append(self, kind: str, file: IO[bytes], values: NDArray[Any]) -> None:
        if len(values):
            file.write(values.data)
            self._hashes[kind].update(values.data)

    def end_batch(self, read_documents: int) -> None:
        """Ends a batch; `read_documents` counts the source's documents so far, including dropped ones."""
        self.read_documents = read_documents
        if self.shard_is_full:
            self._end_shard(closed=True, complete=False)
            self._begin_shard()

    def finish(self, *, complete: bool) -> None:
        """Writes the open shard; `complete` says that the source has no more documents."""
        self._end_shard(closed=False, complete=complete)

    def close(self) -> None:
        """Closes the files and discards what `finish` did not write."""
        self._close_files()
        for stem in ("tokens", "loss", "documents"):
            self._partial(stem).unlink(missing_ok=True)

    def _close_files(self) -> None:
        for file in (self._tokens, self._loss):
            if file is not None:
                file.close()

    def _begin_shard(self) -> None:
        self._hashes = {kind: xxhash.xxh3_128() for kind in ("tokens", "loss")}
        self._tokens = self._partial("tokens").open("wb")
        self._loss: IO[bytes] | None = None
        if self.info.has_loss_mask:
            self._loss = self._partial("loss").open("wb")
        self._signed: list[IntArray] = [np.empty(0, dtype=np.int64)]
        self._train_tokens = self._held_out_tokens = 0
        self.shard_is_full = False

    def _end_shard(self, *, closed: bool, complete: bool) -> None:
        for file in (self._tokens, self._loss):
            if file is not None:
                _sync(file)
        self._close_files()
        number = len(self.records)
        signed = np.concatenate(self._signed)
        with self._partial("documents").open("wb") as file:
            file.write(signed.tobytes())
            _sync(file)
        for stem in ("documents", "tokens", "loss"):
            if self._partial(stem).exists():
                self._partial(stem).replace(self.folder / f"{stem}-{number:05d}.bin")
        sync_folder(self.folder)
        hashes = {"tokens": self._hashes["tokens"].hexdigest(), "documents": _hash(signed)}
        if self.info.has_loss_mask:
            hashes["loss"] = self._hashes["loss"].hexdigest()
        record = ShardRecord(
            num_documents=len(signed),
            train_tokens=self._train_tokens,
            held_out_tokens=self._held_out_tokens,
            read_documents=self.read_documents,
            closed=closed,
            hashes=hashes,
            complete=complete,
        )
        with (self.folder / SHARDS_FILE).open("ab") as file:
            file.write((json.dumps(record.model_dump()) + "\n").encode())
            _sync(file)
        if closed:
            self.records.append(record)

    def _forget_open_shard(self) -> None:
        lines = "".join(json.dumps(record.model_dump()) + "\n" for record in self.records)
        path = self.folder / SHARDS_FILE
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:
            write_text(path, lines)

    def _partial(self, stem: str) -> Path:
        return self.folder / f"{stem}.partial"


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


FORMAT_VERSION = 5
"""Incremented when a new version reads or stores the same source differently."""

IGNORED_FIELDS = ("token_share", "files", "token_files", "max_epochs", "when_exhausted")
"""Settings of a source that do not affect its tokens. File patterns are replaced by the files that they match."""


def source_fingerprint(
    name: str,
    source: SourceSection,
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    files: Sequence[SourceFile] | None = None,
) -> str:
    """Hash of a source's specification and content, the tokenizer, the loss mask and the held-out split.

    The share is not part of it: changing a ratio does not tokenise anything again. Pass the same `files` to
    `read_documents`, so that a file that changes in between is detected.

    Raises:
        MixtureError: If a file of the source is missing.
    """
    specification = asdict(source)
    for key in IGNORED_FIELDS:
        del specification[key]
    instruction = source.group == "instruction"
    parts = {
        "format": FORMAT_VERSION,
        "source": specification,
        "content": _content(name, source, files),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "instruction_loss": mixture.instruction_loss if instruction else None,
        "chat_template": chat_template_text(mixture.chat_template, tokenizer) if instruction else None,
        "validation_fraction": mixture.validation_fraction,
        "remove_duplicates": mixture.remove_duplicates,
        "decontaminate_against": decontamination_fingerprint(mixture),
    }
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _content(name: str, source: SourceSection, files: Sequence[SourceFile] | None) -> list[list[str | int]]:
    # Paths, sizes and times instead of the text, because reading a terabyte to find it unchanged is too slow.
    if source.stdlib is not None:
        sizes = [[module, path.stat().st_size] for module, path in module_paths()]
        return [[sys.version], *sizes]
    if source.hub is not None:
        return []
    found = source_files(name, source) if files is None else files
    return [[str(file.path.resolve()), file.num_bytes, file.modified_ns] for file in found]
