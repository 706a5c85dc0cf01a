"""Where documents come from: the standard library, local files, or a Hugging Face dataset.

Files are read as streams, so that a source larger than memory can be read only as far as a run needs it.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, Any, cast

import datasets
import httpx
import pyarrow
import pyarrow.parquet
from datasets.exceptions import DatasetsError

from sparsify.errors import MixtureError
from sparsify.mixture.documents import Document, content_origin, conversation
from sparsify.mixture.stdlib_text import stdlib_documents
from sparsify.recipe import SourceSection

DOCUMENT_SEPARATOR = "<|endoftext|>"
CHUNK_CHARACTERS = 1 << 20
FORMATS = ".jsonl, .json, .csv, .parquet, .arrow, .txt, each plain or .gz"

Row = Mapping[str, Any]


def read_documents(name: str, source: SourceSection) -> Iterator[Document]:
    """Documents of one source, in the source's own order.

    Args:
        name: The source's name in its mixture, for messages.
        source: Where the text is and which columns hold it.

    Raises:
        MixtureError: If the source cannot be reached or read, lacks a column, or holds no document.
    """
    documents = (document for document in _all_documents(name, source) if document.num_characters)
    first = next(documents, None)
    if first is None:
        raise MixtureError(
            f"Source {name!r} holds no document.",
            next_step="Add text to it, or remove it from the mixture.",
        )
    yield first
    yield from documents


def _all_documents(name: str, source: SourceSection) -> Iterator[Document]:
    if source.stdlib is not None:
        _check_stdlib_group(name, source)
        yield from stdlib_documents(source.stdlib)
    elif source.hub is not None:
        where = f"dataset {source.hub!r} of source {name!r}"
        yield from _documents_from_rows(_hub_rows(name, source), source, where)
    else:
        for path in source_paths(name, source):
            yield from file_documents(path, source, f"{path} of source {name!r}")


def _check_stdlib_group(name: str, source: SourceSection) -> None:
    wanted = "instruction" if source.stdlib == "questions" else "pretraining"
    if source.group != wanted:
        raise MixtureError(
            f"Source {name!r} has stdlib: {source.stdlib} in group {source.group}.",
            allowed="`code` and `prose` are pretraining text, `questions` is instruction text.",
            next_step=f"Set group: {wanted}.",
        )


def source_paths(name: str, source: SourceSection) -> list[Path]:
    """The files of a source, sorted within each pattern.

    Raises:
        MixtureError: If a pattern matches no file.
    """
    paths: list[Path] = []
    for pattern in source.files or []:
        matches = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))  # noqa: PTH207  (Path.glob takes no absolute pattern)
        found = [Path(match) for match in matches if Path(match).is_file()]
        if not found:
            raise MixtureError(
                f"Source {name!r}: no file matches {pattern!r} (looked from {Path.cwd()}).",
                allowed=f"Paths or globs of {FORMATS}.",
                next_step=f"Correct mixture.sources.{name}.files.",
            )
        paths += found
    return list(dict.fromkeys(paths))


def file_documents(path: Path, source: SourceSection, where: str) -> Iterator[Document]:
    """Documents of one file, read as its suffix says.

    Raises:
        MixtureError: If the file's format is unknown, it cannot be read, or a column is missing.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = suffixes[-2] if suffixes[-1:] == [".gz"] and len(suffixes) > 1 else path.suffix.lower()
    try:
        if kind in (".txt", ".text") and source.group == "pretraining":
            for text in _split_texts(path):
                yield Document(content_origin(text), text=text)
        elif kind in ROW_READERS:
            yield from _documents_from_rows(ROW_READERS[kind](path), source, where)
        else:
            raise MixtureError(
                f"{where} cannot be read as {source.group} text.",
                allowed=f"Allowed: {FORMATS}; plain text is for pretraining sources only.",
            )
    except (OSError, EOFError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        # ValueError covers bad JSON and bad UTF-8, EOFError a truncated .gz.
        raise MixtureError(
            f"{where} cannot be read: {error or type(error).__name__}.",
            next_step="Check that the file is complete and of the format that its name says.",
        ) from error


def _documents_from_rows(
    rows: Iterable[Row], source: SourceSection, where: str
) -> Iterator[Document]:
    instruction = source.group == "instruction"
    columns = (
        (source.prompt_column, source.response_column) if instruction else (source.text_column,)
    )
    for number, row in enumerate(rows, start=1):
        values = [_text_of(row, column, number, where) for column in columns]
        if not all(value.strip() for value in values):
            continue
        if instruction:
            yield conversation(content_origin(*values), *values)
        else:
            yield Document(content_origin(*values), text=values[0])


def _text_of(row: Row, column: str, number: int, where: str) -> str:
    if not isinstance(row, Mapping) or column not in row:
        present = sorted(map(str, row)) if isinstance(row, Mapping) else []
        raise MixtureError(
            f"{where}: row {number} has no column {column!r}.",
            allowed=f"Its columns: {', '.join(present) or 'none'}.",
            next_step="Set text_column, or prompt_column and response_column, of the source.",
        )
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise MixtureError(
            f"{where}: column {column!r} of row {number} holds {type(value).__name__}, not text.",
            next_step="Choose a column of text.",
        )
    return value or ""


def _open_binary(path: Path) -> IO[bytes]:
    if path.suffix.lower() == ".gz":
        return cast(IO[bytes], gzip.open(path))
    return path.open("rb")


def _open_text(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    return io.TextIOWrapper(_open_binary(path), encoding="utf-8-sig", newline=newline)


def _split_texts(path: Path) -> Iterator[str]:
    """Documents of plain text, read piece by piece: a file may hold more than memory does."""
    pending = ""
    with _open_text(path) as file:
        while chunk := file.read(CHUNK_CHARACTERS):
            *complete, pending = (pending + chunk).split(DOCUMENT_SEPARATOR)
            yield from (text.strip("\n") for text in complete if text.strip())
    if pending.strip():
        yield pending.strip("\n")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON ({error})") from error


def _json_rows(path: Path) -> Iterator[Row]:
    with _open_text(path) as file:
        rows = json.load(file)
    if not isinstance(rows, list):
        raise ValueError("a .json source is a list of objects; use .jsonl for one object a line")
    yield from rows


def _csv_rows(path: Path) -> Iterator[Row]:
    # csv's own limit of 128 KiB a field is shorter than many documents.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open_text(path, newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _parquet_rows(path: Path) -> Iterator[Row]:
    with pyarrow.parquet.ParquetFile(_arrow_input(path)) as file:
        for batch in file.iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _arrow_rows(path: Path) -> Iterator[Row]:
    with closing(_arrow_input(path)) as file:
        try:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        except pyarrow.ArrowInvalid:  # `datasets` writes the stream format, others the file format
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            yield from batch.to_pylist()


def _arrow_input(path: Path) -> pyarrow.NativeFile:
    if path.suffix.lower() != ".gz":
        return pyarrow.memory_map(str(path))
    with _open_binary(path) as file:
        return pyarrow.BufferReader(file.read())


ROW_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}


def _hub_rows(name: str, source: SourceSection) -> Iterator[Row]:
    try:
        stream = datasets.load_dataset(
            str(source.hub),
            source.hub_config,
            split=source.hub_split,
            revision=source.hub_revision,
            streaming=True,
        )
        yield from stream  # pyright: ignore[reportReturnType]  (a split of a streamed dataset gives dicts)
    except (
        OSError,
        ValueError,
        DatasetsError,
        httpx.HTTPError,
    ) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MixtureError(
            f"Source {name!r}: the dataset {source.hub!r} cannot be read from the Hub: {first_line}",
            allowed="A public dataset id, or a private one after `hf auth login`; HF_HUB_OFFLINE=1 allows cached ones only.",
            next_step="Check hub, hub_config, hub_split and hub_revision, or use local files.",
        ) from error
