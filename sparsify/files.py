"""Atomic writes of files and folders."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sparsify.errors import StorageError

_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "there is no permission to write there",
    errno.EPERM: "there is no permission to write there",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file is there, not a folder",
    errno.EISDIR: "a folder is there, not a file",
    errno.ENAMETOOLONG: "the name is too long",
}
_SHORT_WRITE = re.compile(r"unexpected pos \d+|PytorchStreamWriter|requested and \d+ written")
"""Messages of torch's zip writer and numpy's tofile about a short write."""
_PARTIAL = re.compile(r"\.([^/]+)\.partial-\d+")


@contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns errors of the disk or folder while `path` is written into a `StorageError`.

    Recognises OSError, and what safetensors, torch and numpy raise instead of it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        shown = _PARTIAL.sub(r"\1", str(path))
        raise StorageError(
            f"{shown} cannot be written: {refusal}.",
            next_step="Nothing that was there before was changed. Free space or choose another place, then run the "
            "same command again.",
        ) from error


def _refusal(error: Exception) -> str | None:
    """The disk's reason, or None for any other error."""
    said = str(error)
    code = getattr(error, "errno", None)
    if code is None:
        code = next((known for known in _REFUSALS if os.strerror(known) in said), None)
    if code is None and _SHORT_WRITE.search(said):
        code = errno.ENOSPC
    return _REFUSALS.get(code) if code is not None else None


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder next to `path` that replaces it if the block succeeds, and is removed otherwise.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    whole = path.absolute()  # "." has no name to put anything next to
    partial = whole.with_name(f".{whole.name}.partial-{os.getpid()}")
    with storage_errors(path):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            replace_folder(partial, whole)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def refuse_foreign_folder(to: Path, marker: str, what: str) -> None:
    """Refuses a folder that exists, unless it is empty or an older one of the same kind.

    Args:
        to: The folder to be written.
        marker: File that every folder of this kind holds.
        what: What the folder is, in words.

    Raises:
        StorageError: If it holds other files.
    """
    if not to.exists() or (to.is_dir() and (not any(to.iterdir()) or (to / marker).is_file())):
        return
    raise StorageError(
        f"{to} exists and is not a {what}.",
        allowed=f"A new folder, an empty one, or an old {what}, which is replaced.",
        next_step=f"Choose another folder for the {what.rpartition(' ')[2]}.",
    )


def replace_folder(new: Path, path: Path) -> None:
    """Renames `new` to `path` and removes the old folder, which is restored if the renaming fails."""
    old = path.with_name(f".{path.name}.replaced-{os.getpid()}")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name, then renames it.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON under a temporary name, then renames it."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
