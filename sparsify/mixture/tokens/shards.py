"""The files of a tokenised source: shards of whole documents, which can be read as soon as they are written.

    cache_dir/<fingerprint>/
      source.json             dtype, loss mask, tokenizer; written first
      tokens-00000.bin …      the concatenated documents of a shard, uint16 or uint32
      loss-00000.bin …        instruction sources only: 1 if a token carries loss as a target
      documents-00000.npy …   length of each document, negative if it is held out of training
      shards.jsonl            one line per finished shard, appended after its files are on disk

A line with `"closed": true` never changes, so a reader may follow the file while it grows. Ingest ends with a line that
is not closed: the shard that was unfinished when the need was met. A later ingest writes that shard again and continues
from there; so does an ingest whose predecessor was killed.

Fingerprint of a source: a hash of everything its tokens depend on. It names the source's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from sparsify.files import write_text
from sparsify.mixture.cleaning.decontaminate import decontamination_fingerprint
from sparsify.mixture.sources.source_files import SourceFile, source_files
from sparsify.mixture.sources.stdlib_text import module_paths
from sparsify.mixture.tokens.chat import chat_template_text
from sparsify.mixture.tokens.encoder import Tokenizer, tokenizer_fingerprint
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection

SHARD_TOKENS = 2**23
"""Size at which a shard is closed: large enough to shuffle and pack within, small enough to wait for."""
SHARDS_FILE, SOURCE_FILE = "shards.jsonl", "source.json"
OPEN_SHARDS = 4

IntArray = NDArray[np.int64]


class SourceInfo(BaseModel):
    token_dtype: str
    has_loss_mask: bool
    tokenizer: str
    """Fingerprint of the tokenizer."""
    end_token: int
    """Id of the end-of-sequence token, which also fills the empty positions of a packed sequence."""


class ShardRecord(BaseModel):
    """One line of shards.jsonl."""

    num_documents: int
    train_tokens: int
    held_out_tokens: int
    read_documents: int
    """Documents of the source that were read when the shard ended, including those that were dropped."""
    closed: bool
    """Whether the shard is full and will not change."""
    complete: bool = False
    """Whether the source ends with this shard."""


@dataclass(frozen=True)
class Shard:
    """One opened shard.

    Attributes:
        tokens: The concatenated documents, memory-mapped. [T]
        loss: Which tokens carry loss as a target; None if all do. [T] uint8
        lengths: Number of tokens of each document. [D] int64
        held_out: Which documents are held out of training. [D] bool
    """

    tokens: NDArray[Any]
    loss: NDArray[np.uint8] | None
    lengths: IntArray
    held_out: NDArray[np.bool_]

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
        """The content of source.json, or None if there is none."""
        try:
            return SourceInfo.model_validate_json((self.folder / SOURCE_FILE).read_bytes())
        except (OSError, ValidationError):
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
            with (self.folder / SHARDS_FILE).open("rb") as file:
                file.seek(self._closed_bytes)
                lines = file.read().splitlines(keepends=True)
        except OSError:
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
            f"documents-{number:05d}.npy": record.num_documents * 8,
        }
        if info.has_loss_mask:
            sizes[f"loss-{number:05d}.bin"] = num_tokens
        try:
            return all((self.folder / name).stat().st_size >= size for name, size in sizes.items())
        except OSError:
            return False

    def _open_shard(self, number: int) -> Shard:
        info, record = self.info, self.records[number]
        assert info is not None
        signed = np.load(self.folder / f"documents-{number:05d}.npy")
        # An unfinished shard may have grown since its line was read: use only what the line covers.
        signed = signed[: record.num_documents]
        lengths = np.abs(signed)
        size = int(lengths.sum())
        tokens = _mapped(self.folder / f"tokens-{number:05d}.bin", info.token_dtype, size)
        loss = None
        if info.has_loss_mask:
            loss = _mapped(self.folder / f"loss-{number:05d}.bin", "uint8", size)
        return Shard(tokens, loss, lengths, signed < 0)


def _mapped(path: Path, dtype: str, size: int) -> NDArray[Any]:
    if not size:
        return np.empty(0, dtype=dtype)
    # A plain array over the mapping: indexing is slower in the memmap class.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r", shape=(size,)))


class ShardWriter:
    """Appends documents to a cache folder. The caller must hold the folder's lock.

    Args:
        folder: The cache folder. Closed shards are kept, an unclosed one is written again.
        info: Properties that all its shards share.
    """

    def __init__(self, folder: Path, info: SourceInfo) -> None:
        self.folder, self.info = folder, info
        folder.mkdir(parents=True, exist_ok=True)
        cache = SourceCache(folder)
        cache.refresh()
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
        """Training tokens so far, including the open shard."""
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
        """Appends documents.

        Args:
            ids: Tokens of the concatenated documents. [T]
            carries_loss: Which tokens carry loss; required if the source has a loss mask. [T]
            lengths: Number of tokens of each document. [D]
            held_out: Which documents are held out of training. [D]
        """
        self._tokens.write(np.ascontiguousarray(ids).data)
        if self._loss is not None:
            assert carries_loss is not None
            self._loss.write(carries_loss.astype(np.uint8).data)
        self._signed.append(np.where(held_out, -lengths, lengths))
        self._held_out_tokens += int(lengths[held_out].sum())
        self._train_tokens += int(lengths[~held_out].sum())
        if self._train_tokens + self._held_out_tokens >= SHARD_TOKENS:
            self.shard_is_full = True

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
        self._tokens = self._partial("tokens").open("wb")
        self._loss: IO[bytes] | None = None
        if self.info.has_loss_mask:
            self._loss = self._partial("loss").open("wb")
        self._signed: list[IntArray] = [np.empty(0, dtype=np.int64)]
        self._train_tokens = self._held_out_tokens = 0
        self.shard_is_full = False

    def _end_shard(self, *, closed: bool, complete: bool) -> None:
        self._close_files()
        number = len(self.records)
        signed = np.concatenate(self._signed)
        with self._partial("documents").open("wb") as file:
            np.save(file, signed)
        for stem, suffix in (("documents", "npy"), ("tokens", "bin"), ("loss", "bin")):
            if self._partial(stem).exists():
                self._partial(stem).replace(self.folder / f"{stem}-{number:05d}.{suffix}")
        record = ShardRecord(
            num_documents=len(signed),
            train_tokens=self._train_tokens,
            held_out_tokens=self._held_out_tokens,
            read_documents=self.read_documents,
            closed=closed,
            complete=complete,
        )
        with (self.folder / SHARDS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record.model_dump()) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if closed:
            self.records.append(record)

    def _forget_open_shard(self) -> None:
        lines = "".join(json.dumps(record.model_dump()) + "\n" for record in self.records)
        path = self.folder / SHARDS_FILE
        if not path.is_file() or path.read_text(encoding="utf-8") != lines:
            write_text(path, lines)

    def _partial(self, stem: str) -> Path:
        return self.folder / f"{stem}.partial"


FORMAT_VERSION = 3
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

    The share is not part of it: changing a ratio does not tokenise anything again.

    Args:
        name: Name of the source in its mixture.
        source: The source.
        mixture: Gives the held-out fraction, the chat template and which instruction tokens carry loss.
        tokenizer: A fast Hugging Face tokenizer.
        files: Result of `source_files`; computed by default. Pass the same to `read_documents`, so that a file that
            changes in between is detected.

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
