"""The files of a source: finding them, checking that they have not changed, and opening them."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import hashlib
import io
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import pyarrow

from sparsify.errors import MixtureError
from sparsify.files import storage_errors
from sparsify.metadata import user_path
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
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException, UnicodeDecodeError)
"""Errors that a damaged file raises: truncated archives, invalid Parquet and Arrow files, names of columns that are no text. `damage` tells them from those of
the disk."""
CONTENT_ERRNOS = (None, errno.EINVAL)
"""Error numbers of an OSError that damaged content leads to: none at all, or that of a place before the file's start."""
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),  # begins with the one of UTF-16
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
SAMPLED_BYTES = 1 << 20
READ_BYTES = 1 << 20
MAX_ROW_BYTES = 1 << 26
"""Of one row: one of this size needs 1 GB of memory until it is tokenised, and no book is as long."""
MAX_RATIO = 1000
MAX_SMALL_BYTES = 1 << 28
"""Limits on what a compressed file unpacks to."""
# Small, because the decompressor discards the current buffer when it reaches damaged data.
DECOMPRESSED_BYTES = 1 << 16


class BrokenFileError(OSError):
    """A file whose content does not match its format."""


def damage(error: Exception) -> str:
    """What is wrong with a file's content, from one of the READ_ERRORS, as one line.

    Raises:
        OSError, MemoryError: The same error, if the disk, the network or the memory failed instead. A row that was not
            read because of that is not a bad row.
    """
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno not in CONTENT_ERRNOS):
        raise error
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an error of the disk, the network or the memory while a source's file is read into a MixtureError that names it."""
    try:
        yield
    except MemoryError as error:
        raise MixtureError(
            f"{path} cannot be read: it needs more memory than there is{f' ({error})' if str(error) else ''}.",
            allowed="No row was dropped because of it: it can also be that other programs have the memory.",
            next_step="If the size is beyond what the file can hold, it is damaged: write it again. Otherwise free memory.",
        ) from error
    except OSError as error:
        raise MixtureError(
            f"{path} cannot be read: {os.strerror(error.errno) if error.errno else error}.",
            allowed="No row was dropped because of it: an error of the disk or the network is not one of the text.",
            next_step="Check the disk or the mount, then run the same command again: it continues with what is tokenised.",
        ) from error


@dataclass(frozen=True)
class SourceFile:
    """One file (or saved data set) of a source, with its size and time when it was found.

    Args:
        num_bytes: Size of the file; of a saved data set, the sum over its files.
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
    """Raises MixtureError, saying what changed, if a file has changed since it was found."""
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
    """The bytes of a file, unpacked; text in UTF-16 or UTF-32 with a byte order mark becomes UTF-8."""
    stream = _unpacked(file)
    head = stream.peek(4)[:4]
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if head.startswith(mark)), None)
    return stream if encoding is None else io.BufferedReader(_Transcoded(stream, encoding), READ_BYTES)


def _unpacked(file: SourceFile) -> io.BufferedReader:
    if file.compression == ".gz":
        return io.BufferedReader(_ReadOnce(gzip.open(file.path), file), DECOMPRESSED_BYTES)
    if file.compression == ".xz":
        return io.BufferedReader(_ReadOnce(lzma.open(file.path), file), DECOMPRESSED_BYTES)
    if file.compression == ".zst":
        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd")
        return io.BufferedReader(_ReadOnce(cast(IO[bytes], stream), file), DECOMPRESSED_BYTES)
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
    """Opens a file for random access (Parquet has its index at the end). A compressed one is unpacked to disk.

    Raises:
        StorageError: If the temporary folder cannot hold what is unpacked.
    """
    if not file.compression:
        # Not mapped: an error of the disk would kill the process by SIGBUS.
        with pyarrow.OSFile(str(file.path)) as stream:
            yield stream
        return
    folder = Path(tempfile.gettempdir())
    with tempfile.TemporaryFile() as unpacked, open_binary(file) as packed:
        while chunk := packed.read(READ_BYTES):
            with storage_errors(folder):
                unpacked.write(chunk)
        with storage_errors(folder):
            unpacked.seek(0)
        yield pyarrow.PythonFile(unpacked, mode="r")


class _ReadOnce(io.RawIOBase):
    """A stream that reads its archive once per buffer, so that data before a damaged place is not lost, and that ends an
    archive whose size once unpacked no text explains.
    """

    def __init__(self, archive: IO[bytes] | gzip.GzipFile | lzma.LZMAFile, file: SourceFile) -> None:
        self._archive, self._file, self._unpacked_bytes = cast(io.BufferedReader, archive), file, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._archive.read1(len(buffer))
        buffer[: len(data)] = data
        self._unpacked_bytes += len(data)
        if self._unpacked_bytes > max(MAX_SMALL_BYTES, MAX_RATIO * self._file.num_bytes):
            raise MixtureError(
                f"{self._file.path} unpacks to more than {self._unpacked_bytes:,} bytes, from {self._file.num_bytes:,}.",
                allowed=f"{MAX_RATIO} times the size of the file, or {MAX_SMALL_BYTES:,} bytes: text never compresses better.",
                next_step="Unpack it yourself if it is what you expect, and name the unpacked file.",
            )
        return len(data)

    def close(self) -> None:
        self._archive.close()
        super().close()


class _Transcoded(io.RawIOBase):
    """A stream of text in another encoding as UTF-8."""

    def __init__(self, stream: io.BufferedReader, encoding: str) -> None:
        self._stream, self._encoding, self._held = stream, encoding, b""
        self._decoder = codecs.getincrementaldecoder(encoding)()
        self._begun = self._ended = False

    def readable(self) -> bool:
        return True

    def _check_order(self, text: str) -> None:
        """Refuses a text of the other byte order than its mark says: its letters have become signs of other scripts."""
        swapped = sum(ord(one) > 0 and ord(one) & 0xFF == 0 for one in text)
        if self._encoding == "UTF-16" and swapped > len(text) // 2:
            raise BrokenFileError(
                "its byte order mark says another order than its text has: remove the mark, its first two bytes, and "
                "convert the rest with iconv -f UTF-16LE -t UTF-8, or with UTF-16BE"
            )

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        while not self._held and not self._ended:
            chunk = self._stream.read1()
            self._ended = not chunk
            try:
                self._held = self._decoder.decode(chunk, final=self._ended).encode()
            except UnicodeDecodeError as error:
                raise BrokenFileError(f"it is not valid {self._encoding}: {error.reason}") from error
            if not self._begun:
                self._begun = bool(self._held)
                self._check_order(self._held.decode())
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size

    def close(self) -> None:
        self._stream.close()
        super().close()


def _matches(pattern: str) -> list[Path]:
    found = sorted(glob.glob(str(user_path(pattern)), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
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
    """Raises MixtureError if a file has a format that the source cannot use."""
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
    with disk_errors(file.path), file.path.open("rb") as stream:
        digest = hashlib.blake2b(str(file.num_bytes).encode(), digest_size=16)
        digest.update(cast(BinaryIO, stream).read(SAMPLED_BYTES))
        stream.seek(max(0, file.num_bytes - SAMPLED_BYTES))
        digest.update(stream.read(SAMPLED_BYTES))
    return digest.digest()
