"""The files of a source: which they are, whether they are still what they were, and how they are opened."""

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
"""What a damaged file raises: archives that stop, Parquet and Arrow that are none."""
SAMPLED_BYTES = 1 << 20
READ_BYTES = 1 << 20
# Small, because whatever a decompressor gave in one go is lost when it then meets the damage.
DECOMPRESSED_BYTES = 1 << 16


class BrokenFileError(OSError):
    """A file that does not go on as its format says."""


@dataclass(frozen=True)
class SourceFile:
    """One file (or saved data set) of a source, and how it looked when it was found.

    Args:
        path: As the pattern gave it.
        num_bytes: Its size; of a saved data set that of all its files.
        modified_ns: When it was changed last, in nanoseconds.
    """

    path: Path
    num_bytes: int
    modified_ns: int

    @property
    def compression(self) -> str:
        """`.gz`, `.zst`, `.xz` or nothing."""
        last = self.path.suffix.lower()
        return last if last in COMPRESSIONS else ""

    @property
    def format(self) -> str:
        """Its suffix without the one of the compression, in lower case; SAVED_DATASET for a folder."""
        if not self.compression and _is_saved_dataset(self.path):
            return SAVED_DATASET
        inner = self.path.with_suffix("") if self.compression else self.path
        return inner.suffix.lower()


def source_files(name: str, source: SourceSection) -> tuple[SourceFile, ...]:
    """The files of a source, sorted within each pattern, each once.

    Raises:
        MixtureError: If a pattern matches nothing, or a file is of no known format.
    """
    key = "token_files" if source.token_files else "files"
    found: dict[Path, SourceFile] = {}
    for pattern in source.token_files or source.files or []:
        paths = [path for path in _matches(pattern) if path.is_file() or _is_saved_dataset(path)]
        if not paths:
            raise _no_match(name, key, pattern)
        for path in paths:
            file = look_at(path)
            check_format(name, file, source)
            found.setdefault(path.resolve(), file)
    plain = [file for file in found.values() if file.format in TEXT_FORMATS]
    if not plain and source.document_separator != SourceSection.document_separator:
        raise MixtureError(
            f"Source {name!r} has document_separator={source.document_separator!r}, but none of its files is plain text.",
            allowed=f"Only {' '.join(TEXT_FORMATS)} files are split; rows are documents already.",
            next_step=f"Leave mixture.sources.{name}.document_separator out.",
        )
    return tuple(found.values())


def look_at(path: Path) -> SourceFile:
    """A file as it is now."""
    # A saved data set may be a link into another disk; its files decide.
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [file.stat() for file in files]
    return SourceFile(
        path, sum(stat.st_size for stat in stats), max(stat.st_mtime_ns for stat in stats)
    )


def check_unchanged(name: str, file: SourceFile) -> None:
    """Refuses a file that is no longer what it was when it was found.

    Raises:
        MixtureError: Saying what changed.
    """
    try:
        now = look_at(file.path)
    except OSError as error:
        raise MixtureError(
            f"Source {name!r}: {file.path} cannot be read any more: {error.strerror or error}.",
            next_step="Put it back, or correct the source's files, then run the same command again.",
        ) from error
    if now != file:
        size = f" ({file.num_bytes:,} bytes before, {now.num_bytes:,} now)"
        raise MixtureError(
            f"Source {name!r}: {file.path} changed while it was read{size if now.num_bytes != file.num_bytes else ''}.",
            allowed="Files stay as they are until they are tokenised.",
            next_step="Let whatever writes it finish, then run the same command again.",
        )


def without_duplicates(files: Sequence[SourceFile], bad_rows: BadRows) -> Iterator[SourceFile]:
    """The files whose content no earlier one has, judged by size, first and last megabyte."""
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
    """Opens a file for reading as a stream, decompressed."""
    if file.compression == ".gz":
        return io.BufferedReader(_ReadOnce(gzip.open(file.path)), DECOMPRESSED_BYTES)
    if file.compression == ".xz":
        return io.BufferedReader(_ReadOnce(lzma.open(file.path)), DECOMPRESSED_BYTES)
    if file.compression == ".zst":
        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(str(file.path)), "zstd")
        return io.BufferedReader(cast(io.RawIOBase, stream), DECOMPRESSED_BYTES)
    return io.BufferedReader(io.FileIO(file.path), READ_BYTES)


def open_text(file: SourceFile, newline: str | None = None) -> io.TextIOWrapper:
    """Opens a file as UTF-8. Bytes that are none become lone surrogates, so that their row can be told apart."""
    return io.TextIOWrapper(
        open_binary(file), encoding="utf-8-sig", errors="surrogateescape", newline=newline
    )


def text_chunks(file: SourceFile) -> Iterator[str]:
    """Text of a file piece by piece, decoded as by `open_text`. All that comes before a damage is given."""
    utf8 = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
    decoder = io.IncrementalNewlineDecoder(utf8, translate=True)
    with open_binary(file) as stream:
        while chunk := stream.read1():
            yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


@contextmanager
def open_seekable(file: SourceFile) -> Iterator[pyarrow.NativeFile]:
    """Opens a file at whose end its contents stand. A compressed one is unpacked to disk, not to memory."""
    if not file.compression:
        with pyarrow.memory_map(str(file.path)) as mapped:
            yield mapped
        return
    with tempfile.TemporaryFile() as unpacked, open_binary(file) as packed:
        shutil.copyfileobj(packed, unpacked, READ_BYTES)
        unpacked.seek(0)
        yield pyarrow.PythonFile(unpacked, mode="r")


class _ReadOnce(io.RawIOBase):
    """A stream that asks its archive once for each buffer, so that what comes before a damage is not lost."""

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
    """Refuses a file that a source cannot be read from.

    Raises:
        MixtureError: With the formats that it can be read from.
    """
    if source.token_files:
        known, said = TOKEN_FORMATS, "token files"
        allowed = (
            f"Allowed: {' '.join(TOKEN_FORMATS)}, not compressed, because they are memory-mapped."
        )
    else:
        plain = TEXT_FORMATS if source.group == "pretraining" else ()
        known, said = (*ROW_FORMATS, *plain, SAVED_DATASET), f"{source.group} text"
        allowed = f"Allowed: {FORMATS}; plain text is for pretraining sources only."
    if file.format not in known or (source.token_files and file.compression):
        raise MixtureError(
            f"{file.path} of source {name!r} cannot be read as {said}.", allowed=allowed
        )


def _sample(file: SourceFile) -> bytes:
    with file.path.open("rb") as stream:
        digest = hashlib.blake2b(str(file.num_bytes).encode(), digest_size=16)
        digest.update(cast(BinaryIO, stream).read(SAMPLED_BYTES))
        stream.seek(max(0, file.num_bytes - SAMPLED_BYTES))
        digest.update(stream.read(SAMPLED_BYTES))
    return digest.digest()
