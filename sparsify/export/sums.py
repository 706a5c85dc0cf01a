"""SHA256SUMS: a hash of every file of a folder, as `sha256sum --check` reads it."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUMS = "SHA256SUMS"
READ_BYTES = 1 << 20


def write_sums(folder: Path) -> list[Path]:
    """Writes SHA256SUMS over all files of a folder and returns them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))
    return files


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by file name, as SHA256SUMS has it; nothing if there is no such file."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    pairs = (line.split("  ", 1) for line in path.read_text().splitlines() if "  " in line)
    return {name: digest for digest, name in pairs}


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
