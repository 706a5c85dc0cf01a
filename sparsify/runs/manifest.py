"""manifest.json: what a whole checkpoint consists of, so that a damaged one is noticed before it is loaded."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist
import xxhash

from sparsify.files import write_json

MANIFEST = "manifest.json"
HASHING_THREADS = 4
_OWN_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_")


@dataclass(frozen=True)
class FileEntry:
    """What a file was when it was written."""

    size_bytes: int
    xxh3_128: str


def write_manifest(folder: Path) -> int:
    """Brings a checkpoint's files onto the disk and records them; every rank calls it, once all of them are written.

    Each rank reads back what it wrote itself, while that is still in its machine's memory.

    Returns:
        Bytes of all files.

    Raises:
        OSError: If the disk refuses.
    """
    rank = dist.get_rank()
    mine = [path for path in sorted(folder.iterdir()) if _writer(path.name) == rank]
    entries = {path.name: _record(path) for path in mine}
    gathered: list[dict[str, FileEntry]] = [{}] * dist.get_world_size()
    dist.all_gather_object(gathered, entries)
    files = {name: entry for part in gathered for name, entry in sorted(part.items())}
    if rank == 0:
        write_json(folder / MANIFEST, {"files": {name: asdict(entry) for name, entry in files.items()}})
        sync_folder(folder)
    return sum(entry.size_bytes for entry in files.values())


def damage(checkpoint: Path, names: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, or None when they are as they were written.

    Sizes of all files first, which costs nothing; then hashes, at the speed of one more reading.

    Args:
        checkpoint: Its folder.
        names: Files whose hashes are compared; all unless given.
    """
    try:
        recorded = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        files = {name: FileEntry(**entry) for name, entry in recorded.items()}
    except FileNotFoundError:
        return "it is not there" if not checkpoint.is_dir() else f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error!r})"
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry.size_bytes:
            return f"{name} has {path.stat().st_size:,} bytes instead of {entry.size_bytes:,}"
    hashed = [name for name in files if names is None or name in names]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        for name, found in zip(hashed, pool.map(lambda name: _hash_or_error(checkpoint / name), hashed), strict=True):
            if found != files[name].xxh3_128:
                return f"the content of {name} is not what was written ({found})"
    return None


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _writer(name: str) -> int:
    """The rank that DeepSpeed lets write a file: its number is in the name of a shard, all else is rank 0's."""
    own = _OWN_SHARD.search(name)
    return int(own[1]) if own else 0


def _record(path: Path) -> FileEntry:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry(path.stat().st_size, _hash(path))


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _hash_or_error(path: Path) -> str:
    try:
        return _hash(path)
    except OSError as error:
        return str(error)
