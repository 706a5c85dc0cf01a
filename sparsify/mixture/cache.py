"""The files of a tokenised source: writing them shard by shard, and opening them memory-mapped."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

SHARD_TOKENS = 2**25

Shards = tuple[NDArray[Any], ...]


class SourceIndex(BaseModel):
    """What a cache folder holds; written last, so a folder that has it is whole."""

    num_documents: int
    num_tokens: int
    token_dtype: str
    has_loss_mask: bool
    complete: bool
    """Whether the source was read to its end."""
    tokenizer: str


@dataclass(frozen=True)
class CachedSource:
    """An opened cache folder: see `SourceIndex`; arrays as in `tokens.TokenizedSource`."""

    index: SourceIndex
    lengths: NDArray[np.int64]
    held_out: NDArray[np.bool_]
    token_shards: Shards
    loss_shards: Shards


def open_cache(folder: Path) -> CachedSource | None:
    """Opens a cache folder; None if there is none or it is damaged."""
    try:
        index = SourceIndex.model_validate_json((folder / "index.json").read_text())
        lengths = np.fromfile(folder / "lengths.bin", dtype=np.int64)
        held_out = np.fromfile(folder / "held_out.bin", dtype=np.bool_)
        tokens = _open_shards(folder, "tokens", np.dtype(index.token_dtype), index.num_tokens)
        masked_tokens = index.num_tokens if index.has_loss_mask else 0
        losses = _open_shards(folder, "loss", np.dtype(np.uint8), masked_tokens)
    except (
        OSError,
        ValidationError,
        ValueError,
    ):  # ValueError: a shard shorter than the index says
        return None
    if not len(lengths) == len(held_out) == index.num_documents:
        return None
    return CachedSource(index, lengths, held_out, tokens, losses)


def _open_shards(folder: Path, stem: str, dtype: np.dtype[Any], num_tokens: int) -> Shards:
    sizes = [min(SHARD_TOKENS, num_tokens - first) for first in range(0, num_tokens, SHARD_TOKENS)]
    return tuple(
        np.memmap(folder / f"{stem}-{number:05d}.bin", dtype=dtype, mode="r", shape=(size,))
        for number, size in enumerate(sizes)
    )


def read_shards(shards: Shards, start: int, stop: int) -> NDArray[Any]:
    """Elements [start, stop) of the shards laid one after another."""
    assert 0 <= start <= stop <= sum(map(len, shards)), (start, stop)
    pieces = []
    while start < stop:
        number, offset = divmod(start, SHARD_TOKENS)
        piece = shards[number][offset : offset + stop - start]
        pieces.append(piece)
        start += len(piece)
    return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)


class CacheWriter:
    """Writes a cache folder under a temporary name; renames it when the `with` block ends well.

    Hold the folder's lock around it.
    """

    def __init__(self, folder: Path, token_dtype: np.dtype[Any], *, has_loss_mask: bool) -> None:
        self.folder, self.token_dtype, self.has_loss_mask = (
            folder,
            token_dtype,
            has_loss_mask,
        )
        self.lengths: list[int] = []
        self.held_out: list[bool] = []
        self.num_tokens = self.num_train_tokens = self.num_held_out_tokens = 0
        self._shards = ExitStack()
        self._open: dict[str, IO[bytes]] = {}

    def __enter__(self) -> Self:
        # Only the holder of the lock is here, so leftovers belong to a process that was killed.
        for leftover in self.folder.parent.glob(f"{self.folder.name}.partial-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        prefix = f"{self.folder.name}.partial-"
        self.partial = Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder.parent))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shards.close()
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(
        self,
        ids: NDArray[np.unsignedinteger],
        carries_loss: NDArray[np.bool_],
        held_out: bool,
    ) -> None:
        """Appends one document."""
        self._append("tokens", ids)
        if self.has_loss_mask:
            self._append("loss", carries_loss.astype(np.uint8))
        self.lengths.append(len(ids))
        self.held_out.append(held_out)
        self.num_tokens += len(ids)
        self.num_held_out_tokens += len(ids) * held_out
        self.num_train_tokens += len(ids) * (not held_out)

    def finish(self, *, complete: bool, tokenizer: str) -> None:
        """Writes lengths and index, and puts the folder in its place."""
        self._shards.close()
        np.array(self.lengths, dtype=np.int64).tofile(self.partial / "lengths.bin")
        np.array(self.held_out, dtype=np.bool_).tofile(self.partial / "held_out.bin")
        index = SourceIndex(
            num_documents=len(self.lengths),
            num_tokens=self.num_tokens,
            token_dtype=self.token_dtype.name,
            has_loss_mask=self.has_loss_mask,
            complete=complete,
            tokenizer=tokenizer,
        )
        (self.partial / "index.json").write_text(index.model_dump_json(indent=2))
        shutil.rmtree(self.folder, ignore_errors=True)  # what stands there holds too little
        self.partial.rename(self.folder)

    def _append(self, stem: str, values: NDArray[Any]) -> None:
        first = self.num_tokens
        for number, piece in _split_at_shards(values, first):
            self._shard(stem, number).write(piece.tobytes())

    def _shard(self, stem: str, number: int) -> IO[bytes]:
        name = f"{stem}-{number:05d}.bin"
        if name not in self._open:
            self._open[name] = self._shards.enter_context((self.partial / name).open("wb"))
        return self._open[name]


def _split_at_shards(values: NDArray[Any], first: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Shard number and piece of values whose first one has the index `first` over all shards."""
    taken = 0
    while taken < len(values):
        number, offset = divmod(first + taken, SHARD_TOKENS)
        piece = values[taken : taken + SHARD_TOKENS - offset]
        yield number, piece
        taken += len(piece)
