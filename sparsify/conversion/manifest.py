"""manifest.json: what a whole checkpoint consists of, so that a damaged one is noticed before it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from sparsify.errors import RunError
from sparsify.files import write_json
from sparsify.metadata import read_record

MANIFEST = "manifest.json"
HASHING_THREADS = 4


@dataclass(frozen=True)
class FileEntry:
    """What a file was when it was written."""

    size_bytes: int
    xxh3_128: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        return cls(path.stat().st_size, _hash(path))


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        outside = [name for name in self.files if Path(name).is_absolute() or ".." in Path(name).parts]
        if outside:
            raise ValueError(f"it names {outside[0][:80]!r}, which is not a file of the folder")


def record_files(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Writes the manifest of a folder, from what its files are by their paths in it."""
    write_json(folder / MANIFEST, {"files": {name: asdict(entry) for name, entry in files.items()}})


def record_folder(folder: Path) -> None:
    """Writes the manifest of a folder from all that it holds now."""
    record_files(folder, present_files(folder))


def present_files(folder: Path) -> dict[str, FileEntry]:
    """What a folder's files are now, without the manifest."""
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: FileEntry.of(folder / name) for name in names if name != MANIFEST}


def recorded_files(folder: Path) -> dict[str, FileEntry]:
    """What a folder's files were when its manifest was written.

    Raises:
        RunError: If it cannot be read or is not one.
    """
    return read_record(folder / MANIFEST, _Manifest, "the manifest of a folder", RunError).files


def known_files(folder: Path) -> dict[str, FileEntry]:
    """What a folder's files were when its manifest was written; where that cannot be read, what they are now."""
    try:
        return recorded_files(folder)
    except RunError:
        return present_files(folder)


def damage(checkpoint: Path, names: Collection[str] | None = None) -> str | None:
    """What is wrong with a checkpoint's files, or None when they are as they were written.

    Sizes of all files first, which costs nothing; then hashes, at the speed of one more reading.

    Args:
        checkpoint: Its folder.
        names: Files whose hashes are compared; all unless given.
    """
    if not (checkpoint / MANIFEST).exists():
        return "it is not there" if not checkpoint.is_dir() else f"{MANIFEST} is missing"
    try:
        files = recorded_files(checkpoint)
    except RunError as error:
        return error.given.removeprefix(f"{checkpoint}/").rstrip(".")
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


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _hash_or_error(path: Path) -> str:
    try:
        return _hash(path)
    except OSError as error:
        return str(error)
