"""Atomic writes of files and folders, and the base of what JSON files hold."""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from sparsify.errors import StorageError

_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "there is no permission",
    errno.EPERM: "there is no permission",
    errno.EROFS: "the file system is read-only",
    errno.EIO: "the disk reports an error",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file is there, not a folder",
    errno.EISDIR: "a folder is there, not a file",
    errno.EFBIG: "it would be larger than a file may be there",
    errno.ENAMETOOLONG: "the name is too long",
}
_SHORT_WRITE = re.compile(r"unexpected pos \d+|PytorchStreamWriter|requested and \d+ written")
"""Messages of torch's zip writer and numpy's tofile about a short write."""
_PARTIAL = re.compile(r"\.([^/]+)\.partial-\d+")


class JsonRecord(BaseModel):
    """What a JSON file holds. NaN and infinity, such as a diverged model's loss, become strings: null means "not measured"."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


@contextmanager
def storage_errors(path: Path, what: Literal["written", "read"] = "written") -> Iterator[None]:
    """Turns errors of the disk or folder while `path` is written or read into a `StorageError`.

    Recognises OSError, and what safetensors, torch and numpy raise instead of it.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        shown = _PARTIAL.sub(r"\1", str(path))
        place = "Free space or choose another place" if what == "written" else "Check the disk or the mount"
        raise StorageError(
            f"{shown} cannot be {what}: {refusal}.",
            next_step=f"Nothing that was there before was changed. {place}, then run the same command again.",
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


def refuse_dangling(path: Path) -> None:
    """Raises StorageError if a path, or a folder that it is in, is a link to nothing: nothing can be made there."""
    for one in (path, *path.parents):
        if one.is_symlink() and not one.exists():
            raise StorageError(
                f"{path} cannot be written: {one} is a link that leads to no file ({one.readlink()}).",
                next_step="Correct or remove the link, or choose another place.",
            )


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder next to `path` that replaces it, once it is on the disk, if the block succeeds, and is
    removed otherwise. What a killed process left of an earlier attempt is removed before.

    Raises:
        StorageError: If the disk or the folder refuses.
    """
    whole = path.absolute()  # "." has no name to put anything next to
    partial = whole.with_name(f".{whole.name}.partial-{os.getpid()}")
    refuse_dangling(whole)
    with storage_errors(path):
        clear_remains(whole)
        partial.mkdir(parents=True)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            with suppress(OSError):  # some file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield partial
            _sync_all(partial)
            replace_folder(partial, whole)
            sync_folder(whole.parent)
        finally:
            os.close(descriptor)
            shutil.rmtree(partial, ignore_errors=True)


def clear_remains(path: Path) -> None:
    """Removes what killed processes left when they wrote a folder, and restores the folder where one of them was killed
    between two renames. What a living process writes, which has it locked, stays.
    """
    for remains in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        if _PARTIAL.fullmatch(remains.name) and remains.is_dir() and not _is_locked(remains):
            shutil.rmtree(remains, ignore_errors=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.replaced-*"):
        if not path.exists():
            old.rename(path)
        else:
            shutil.rmtree(old, ignore_errors=True)


def clear_partial_files(folder: Path) -> None:
    """Removes what killed processes left when they wrote files of a folder that nobody else writes now."""
    for remains in folder.glob(".*.partial-*"):
        if _PARTIAL.fullmatch(remains.name) and remains.is_file():
            remains.unlink(missing_ok=True)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def _sync_all(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            with Path(place, name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(place))


def refuse_foreign_folder(to: Path, marker: str, what: str) -> None:
    """Raises StorageError if a folder holds other files than an older one of the same kind, which has `marker`, or cannot be made."""
    refuse_dangling(to)
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
    """Writes a file under a temporary name, then renames it."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    refuse_dangling(path.parent)
    with storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
