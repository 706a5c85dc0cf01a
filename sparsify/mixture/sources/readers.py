"""Readers of every row format, in constant memory. A row that cannot be read is reported and skipped.

The standard library's JSON parser needs a whole document in memory; `json_list` yields its elements one by one.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Protocol, cast

import pyarrow
import pyarrow.parquet
from pydantic_core import from_json

from sparsify.mixture.sources.bad_rows import Reason
from sparsify.mixture.sources.rows import TOOLS_COLUMN
from sparsify.mixture.sources.source_files import (
    MAX_ROW_BYTES,
    READ_BYTES,
    READ_ERRORS,
    SAVED_DATASET,
    BrokenFileError,
    SourceFile,
    damage,
    open_binary,
    open_seekable,
    open_text,
    text_chunks,
)

MAX_VALUE_CHARACTERS = MAX_ROW_BYTES
_SPACE = re.compile(r"[ \t\n\r]*")
# An error this close to the end of the buffer may be due to text that is not read yet. The longest token that the
# parser reports at its start is a surrogate pair, "\\ud83d\\ude00".
_MARGIN = 16


def json_list(chunks: Iterable[str]) -> Iterator[Any]:
    """Elements of a JSON list, or of the only list of objects inside a JSON object.

    Elements before a damaged place are yielded before the error. Why not ijson (3.6, C back-end): it reads 500 MB/s of
    rows instead of 300, but ends the file at the NaN that `json.dump` writes and at an integer of more than 64 bits,
    turns a lone surrogate into "?" silently, where here the row is reported, and does not say at which character of
    the file it failed.

    Raises:
        BrokenFileError: If the text is not valid JSON, or holds no such list.
    """
    text = _Text(iter(chunks))
    opening = text.peek()
    if opening == "[":
        yield from _elements(text)
    elif opening == "{":
        yield from _list_inside(text)
    elif opening:
        raise BrokenFileError("it holds neither a list nor an object; use .jsonl for one object a line")
    if text.peek():
        raise BrokenFileError(
            f"it has text after its end, at character {text.position:,}; use .jsonl for one object a line"
        )


def _elements(text: _Text) -> Iterator[Any]:
    text.take("[")
    if text.peek() == "]":
        text.take("]")
        return
    while True:
        yield text.value()
        if text.peek() == "]":
            text.take("]")
            return
        text.take(",")


def _list_inside(text: _Text) -> Iterator[Any]:
    text.take("{")
    found = None
    while text.peek() != "}":
        key = text.value()
        text.take(":")
        if text.peek() == "[":
            elements = _elements(text)
            first = next(elements, None)
            if isinstance(first, dict):
                if found is not None:
                    raise BrokenFileError(f"it holds two lists, {found!r} and {key!r}")
                found = key
                yield first
                yield from elements
            for _ in elements:
                pass
        else:
            text.value()
        if text.peek() != "}":
            text.take(",")
    text.take("}")
    if found is None:
        raise BrokenFileError("it is an object that holds no list of objects")


class _Text:
    """A JSON text that is read in chunks: a buffer and a position in it."""

    def __init__(self, chunks: Iterator[str]) -> None:
        self._chunks, self._held, self._at = chunks, "", 0
        self._before = 0
        self._decoder = json.JSONDecoder()

    @property
    def position(self) -> int:
        return self._before + self._at

    def peek(self) -> str:
        """The next character that is not whitespace; "" at the end."""
        while True:
            self._at = _SPACE.match(self._held, self._at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self._at < len(self._held) or not self._more():
                return self._held[self._at : self._at + 1]

    def take(self, wanted: str) -> None:
        found = self.peek()
        if found != wanted:
            got = f"{found!r}" if found else "the end of the file"
            raise BrokenFileError(f"{wanted!r} expected, {got} found, at character {self.position:,}")
        self._at += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._held, self._at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated string") or error.pos >= len(self._held) - _MARGIN
                held = len(self._held) - self._at
                # Double the buffer each time, so that a long value is parsed again only a few times.
                if not (unfinished and held < MAX_VALUE_CHARACTERS and self._more(held)):
                    where = self._before + error.pos
                    raise BrokenFileError(f"not JSON: {error.msg}, at character {where:,}") from error
                continue
            except (ValueError, RecursionError) as error:
                raise BrokenFileError(f"not JSON: {error}, at character {self.position:,}") from error
            # A number at the end of the buffer may be incomplete: "1" of "1.5", or "1e-" of "1e-5".
            whole = not isinstance(value, int | float) or end < len(self._held) - len("e-")
            if whole or not self._more():
                self._at = end
                return value

    def _more(self, characters: int = 1) -> bool:
        """Reads at least `characters` more. Returns False at the end of the file."""
        pieces = [self._held[self._at :]]
        read = 0
        for chunk in self._chunks:
            pieces.append(chunk)
            read += len(chunk)
            if read >= characters:
                break
        if read:
            self._before += self._at
            self._held, self._at = "".join(pieces), 0
        return read > 0


BATCH_BYTES = 1 << 25
MAX_BATCH_ROWS = 1024
BOM = b"\xef\xbb\xbf"

Rows = Iterator[tuple[int, Any]]
"""(number, value) of each row. The number is the line for line-based formats, otherwise the row, from 1."""


class Report(Protocol):
    """Callback for rows that cannot be read: `BadRows.add` of one file."""

    def __call__(self, reason: Reason, row: int, detail: str, rows: int = 1) -> None: ...


def read_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    """Rows of a file of any row format."""
    number = 0
    try:
        for number, row in _READERS[file.format](file, columns, report):
            yield number, row
    except READ_ERRORS as error:
        report(Reason.BROKEN_FILE, number, f"is the last readable row: {damage(error)}")


def _jsonl_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    with open_binary(file) as stream:
        for number, line in _lines(stream, report):
            try:
                row = from_json(line)  # three times as fast as the json module, and stricter
            except ValueError:
                # Invalid UTF-8 becomes lone surrogates, so it invalidates only the columns that hold it.
                text = line.decode("utf-8", "surrogateescape")
                if text.isspace():
                    continue
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    report(Reason.NOT_JSON, number, f"is not JSON: {error}")
                    continue
            yield number, row


def _lines(stream: io.BufferedReader, report: Report) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_ROW_BYTES)
            report(Reason.TOO_LONG, number, f"is a line of more than {MAX_ROW_BYTES:,} bytes")
            continue
        yield number, line.removeprefix(BOM) if number == 1 else line


def _json_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    yield from enumerate(json_list(text_chunks(file)), start=1)


def _csv_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    # The csv module's default limit of 128 KiB per field is shorter than many documents.
    csv.field_size_limit(MAX_ROW_BYTES)
    header: list[str] | None = None
    with open_text(file, newline="") as stream:
        dialect = "excel-tab" if file.format == ".tsv" else "excel"
        reader = csv.reader(stream, dialect, strict=True)
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                report(Reason.NOT_CSV, reader.line_num, f"is not {file.format[1:]}: {error}")
                continue
            if header is None:
                header = values
            elif len(values) == len(header):
                yield reader.line_num, dict(zip(header, values, strict=True))
            elif values:
                detail = f"has {len(values)} fields for {len(header)} columns"
                report(Reason.NOT_CSV, reader.line_num, detail)


def _parquet_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    with open_seekable(file) as stream, pyarrow.parquet.ParquetFile(stream, buffer_size=READ_BYTES) as parquet:
        wanted = _projection(parquet.schema_arrow.names, columns)
        first = 1
        for index in range(parquet.num_row_groups):
            group = parquet.metadata.row_group(index)
            batches = parquet.iter_batches(_batch_rows(group), row_groups=[index], columns=wanted)
            read = 0
            try:
                for batch in batches:
                    yield from _batch(batch, first + read, report)
                    read += batch.num_rows
            except READ_ERRORS as error:
                detail = f"starts rows of row group {index} that cannot be read: {damage(error)}"
                report(Reason.UNREADABLE, first + read, detail, rows=group.num_rows - read)
            first += group.num_rows


def _batch_rows(group: Any) -> int:
    """Rows to hold at once: at most BATCH_BYTES of them."""
    row_bytes = max(1, group.total_byte_size / max(1, group.num_rows))
    return min(MAX_BATCH_ROWS, max(1, math.floor(BATCH_BYTES / row_bytes)))


def _arrow_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    with open_seekable(file) as stream:
        try:
            reader = pyarrow.ipc.open_file(stream)
        except pyarrow.ArrowInvalid:  # `datasets` writes the stream format, others the file format
            stream.seek(0)
            yield from _batches(pyarrow.ipc.open_stream(stream), columns, report)
            return
        first = 1
        for index in range(reader.num_record_batches):
            try:
                batch = reader.get_batch(index)
            except READ_ERRORS as error:
                report(Reason.UNREADABLE, first, f"starts batch {index}, which cannot be read: {damage(error)}")
                continue
            yield from _batches([batch], columns, report, first)
            first += batch.num_rows


def _saved_rows(file: SourceFile, columns: Collection[str] | None, report: Report) -> Rows:
    import datasets  # half a second, and hardly any source needs it
    from datasets.exceptions import DatasetsError

    try:
        saved = datasets.Dataset.load_from_disk(str(file.path))
    except (ValueError, LookupError, TypeError, AttributeError, DatasetsError) as error:
        raise BrokenFileError(f"is not a data set that can be loaded: {error}") from error
    tables = saved.with_format("arrow").iter(batch_size=64)
    yield from _batches((batch for table in tables for batch in cast(Any, table).to_batches()), columns, report)


def _batches(batches: Any, columns: Collection[str] | None, report: Report, first: int = 1) -> Rows:
    for batch in batches:
        wanted = _projection(batch.schema.names, columns)
        for start in range(0, batch.num_rows, MAX_BATCH_ROWS):
            piece = batch.slice(start, MAX_BATCH_ROWS)
            yield from _batch(piece.select(wanted) if wanted else piece, first + start, report)
        first += batch.num_rows


def _batch(batch: Any, first: int, report: Report) -> Rows:
    try:
        _check_layout(batch)
        rows = batch.to_pylist()
    except (ValueError, pyarrow.ArrowException):
        yield from _one_by_one(batch, first, report)
        return
    yield from enumerate(rows, start=first)


def _one_by_one(batch: Any, first: int, report: Report) -> Rows:
    for index in range(batch.num_rows):
        one = batch.slice(index, 1)
        try:
            _check_layout(one)
            (row,) = one.to_pylist()
        except UnicodeDecodeError as error:
            report(Reason.INVALID_UTF8, first + index, f"holds a text that is not UTF-8: {error}")
        except (ValueError, pyarrow.ArrowException) as error:
            report(Reason.UNREADABLE, first + index, f"cannot be read: {error}")
        else:
            yield first + index, row


def _check_layout(batch: Any) -> None:
    """Raises ArrowInvalid if a batch refers to places outside of its buffers, as in a damaged .arrow file: Arrow itself would
    read there, and may end the process.
    """
    for column in batch.columns:
        try:
            # As bytes, so that only the layout is checked: a text that is not UTF-8 costs its own row alone.
            bare = column.view(_as_bytes(column.type))
        except pyarrow.ArrowNotImplementedError:
            bare = column
        bare.validate(full=True)


def _as_bytes(type_: Any) -> Any:
    """An Arrow type of the same layout with bytes in place of each text."""
    types = pyarrow.types
    if types.is_string(type_):
        return pyarrow.binary()
    if types.is_large_string(type_):
        return pyarrow.large_binary()
    if types.is_struct(type_):
        return pyarrow.struct([field.with_type(_as_bytes(field.type)) for field in type_])
    if types.is_list(type_):
        return pyarrow.list_(type_.value_field.with_type(_as_bytes(type_.value_type)))
    if types.is_large_list(type_):
        return pyarrow.large_list(type_.value_field.with_type(_as_bytes(type_.value_type)))
    return type_


def _projection(names: list[str], columns: Collection[str] | None) -> list[str] | None:
    """The columns to read: those needed, or all if one is missing, so that the error can list them."""
    if columns is None or not set(columns) <= set(names):
        return None
    return sorted({*columns, *({TOOLS_COLUMN} & set(names))})


_READERS: dict[str, Callable[[SourceFile, Collection[str] | None, Report], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".ndjson": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
    SAVED_DATASET: _saved_rows,
}
