"""The files of a source: finding them, checking that they have not changed, and opening them."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import pyarrow

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, DuplicateFile
from sparsify.recipe.source import SourceSection

TEXT_FORMATS = (".txt", ".text", ".md")
ROW_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
TOKEN_FORMATS = (".npy", ".bin")
COMPRESSIONS = (".gz", ".zst", ".xz")
SAVED_DATASET = "saved dataset"
FORMATS = (
    f"{' '.join(ROW_FORMATS)} {' '.join(TEXT_FORMATS)}, each plain or {' '.join(COMPRESSIONS)}, "
    "and folders that datasets.save_to_disk wrote"
)
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
"""Errors that a damaged file raises: truncated archives, invalid Parquet and Arrow files."""
SAMPLED_BYTES = 1 << 20
READ_BYTES = 1 << 20
# Small, because the decompressor discards the current buffer when it reaches damaged data.
DECOMPRESSED_BYTES = 1 << 16


class BrokenFileError(OSError):
    """A file whose content does not match its format."""


@dataclass(frozen=True)
class SourceFile:
    """One file (or saved data set) of a source, with its size and time when it was found.

    Args:
        path: The path that the pattern matched.
        num_bytes: Size of the file; of a saved data set, the sum over its files.
        modified_ns: Time of the last modification, in nanoseconds.
    """

    path: Path
    num_bytes: int
    modified_ns: int

    @property
    def compression(self) -> str:
        last = self.path.suffix.lower()
        return last if last in COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """The lower-case suffix without that of the compression; SAVED_DATASET for a folder."""
        if not self.compression and _is_saved_dataset(self.path):
            return SAVED_DATASET
        inner = self.path.with_suffix("") if self.compression else self.path
        return inner.suffix.lower()


def source_files(name: str, source: SourceSection) -> tuple[SourceFile, ...]:
    """The files of a source, sorted within each pattern, without repetitions.

    Raises:
        MixtureError: If a pattern matches nothing, or a file has an unknown format.
    """
    key = "token_files" if source.token_files else "files"
    found: dict[Path, SourceFile] = {}
    for pattern in source.token_files or source.files or []:
        paths = [path for path in _matches(pattern) if path.is_file() or _is_saved_dataset(path)]
        if not paths:
            raise _no_match(name, key, pattern)
        for path in paths:
            file = file_state(path)
            check_format(name, file, source)
            found.setdefault(path.resolve(), file)
    plain = [file for file in found.values() if file.format in TEXT_FORMATS]
    if not plain and source.document_separator != SourceSection.document_separator:
        raise MixtureError(
            f"Source {name!r} has document_separator={source.document_separator!r}, but none of its files is plain text.",
            allowed=f"Only {' '.join(TEXT_FORMATS)} files are split; in other formats each row is a document.",
            next_step=f"Remove mixture.sources.{name}.document_separator.",
        )
    return tuple(found.values())


def file_state(path: Path) -> SourceFile:
    # A saved data set may be a symbolic link, so its files are examined.
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return SourceFile(path, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats))


def check_unchanged(name: str, file: SourceFile) -> None:
    """Raises if a file has changed since it was found.

    Raises:
        MixtureError: Says what changed.
    """
    try:
        now = file_state(file.path)
    except OSError as error:
        raise MixtureError(
            f"Source {name!r}: {file.path} can no longer be read: {error.strerror or error}.",
            next_step="Restore the file, or correct the source's files, then run the same command again.",
        ) from error
    if now != file:
        size = f" ({file.num_bytes:,} bytes before, {now.num_bytes:,} now)"
        raise MixtureError(
            f"Source {name!r}: {file.path} changed while it was read{size if now.num_bytes != file.num_bytes else ''}.",
            allowed="Files must not change until they are tokenised.",
            next_step="Wait until the file is fully written, then run the same command again.",
        )


def without_duplicates(files: Sequence[SourceFile], bad_rows: BadRows) -> Iterator[SourceFile]:
    """Skips files with the same content as an earlier one: same size, same first and last megabyte."""
    by_size: dict[int, list[SourceFile]] = {}
    for file in files:
        by_size.setdefault(file.num_bytes, []).append(file)
    first: dict[bytes, SourceFile] = {}
    for file in files:
        if file.num_bytes and len(by_size[file.num_bytes]) > 1 and file.path.is_file():
            original = first.setdefault(_sample(file), file)
            if original is not file:
                bad_rows.duplicate_files.append(DuplicateFile(str(file.path), str(original.path)))
                continue
        yield file


def open_binary(file: SourceFile) -> io.BufferedReader:
    if file.compression == ".gz":
        return io.BufferedReader(_ReadOnce(gzip.open(file.path)), DECOMPRESSED_BYTES)
    if file.compression == ".xz":
        return io.BufferedReader(_ReadOnce(lzma.open(file.path)), DECOMPRESSED_BYTES)
    if file.compression == ".zst":
        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), DECOMPRESSED_BYTES)
    return io.BufferedReader(io.FileIO(file.path), READ_BYTES)


def open_text(file: SourceFile, newline: str | None = None) -> io.TextIOWrapper:
    """Opens a file as UTF-8. Invalid bytes become lone surrogates, so that their row can be identified."""
    return io.TextIOWrapper(open_binary(file), encoding="utf-8-sig", errors="surrogateescape", newline=newline)


def text_chunks(file: SourceFile) -> Iterator[str]:
    """Text of a file in chunks, decoded as by `open_text`. Yields everything before a damaged place."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    with open_binary(file) as stream:
        while chunk := stream.read1():
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


@contextmanager
def open_seekable(file: SourceFile) -> Iterator[pyarrow.NativeFile]:
    """Opens a file for random access (Parquet has its index at the end). A compressed one is unpacked to disk."""
    if not file.compression:
        with pyarrow.memory_map(str(file.path)) as mapped:
            yield mapped
        return
    with tempfile.TemporaryFile() as unpacked, open_binary(file) as packed:
        shutil.copyfileobj(packed, unpacked, READ_BYTES)
        unpacked.seek(0)
        yield pyarrow.PythonFile(unpacked, mode="r")


class _ReadOnce(io.RawIOBase):
    """A stream that reads its archive once per buffer, so that data before a damaged place is not lost."""

    def __init__(self, archive: IO[bytes] | gzip.GzipFile | lzma.LZMAFile) -> None:
        self._archive = cast(io.BufferedReader, archive)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._archive.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._archive.close()
        super().close()


def _matches(pattern: str) -> list[Path]:
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
    return [Path(match) for match in found]


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _no_match(name: str, key: str, pattern: str) -> MixtureError:
    folders = [path for path in _matches(pattern) if path.is_dir()]
    splits = [path.parent for folder in folders for path in sorted(folder.glob("*/state.json"))]
    if splits:
        advice = f"It is a folder of saved splits; name one of them: {', '.join(map(str, splits))}."
    elif folders:
        advice = f"It is a folder; name its files: {folders[0] / '*.jsonl'}, for example."
    else:
        advice = f"Correct mixture.sources.{name}.{key}."
    allowed = f"{' '.join(TOKEN_FORMATS)}" if key == "token_files" else FORMATS
    return MixtureError(
        f"Source {name!r}: no file matches {pattern!r} (looked from {Path.cwd()}).",
        allowed=f"Paths or globs of {allowed}.",
        next_step=advice,
    )


def check_format(name: str, file: SourceFile, source: SourceSection) -> None:
    """Raises if a file has a format that the source cannot use.

    Raises:
        MixtureError: Lists the formats that it can use.
    """
    if source.token_files:
        known, kind = TOKEN_FORMATS, "token files"
        allowed = f"Allowed: {' '.join(TOKEN_FORMATS)}, uncompressed, because they are memory-mapped."
    else:
        plain = TEXT_FORMATS if source.group == "pretraining" else ()
        known, kind = (*ROW_FORMATS, *plain, SAVED_DATASET), f"{source.group} text"
        allowed = f"Allowed: {FORMATS}; plain text is for pretraining sources only."
    if file.format not in known or (source.token_files and file.compression):
        raise MixtureError(f"{file.path} of source {name!r} cannot be read as {kind}.", allowed=allowed)


def _sample(file: SourceFile) -> bytes:
    with file.path.open("rb") as stream:
        digest = hashlib.blake2b(str(file.num_bytes).encode(), digest_size=16)
        digest.update(cast(BinaryIO, stream).read(SAMPLED_BYTES))
        stream.seek(max(0, file.num_bytes - SAMPLED_BYTES))
        digest.update(stream.read(SAMPLED_BYTES))
    return digest.digest()
