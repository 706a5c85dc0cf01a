"""Reads the documents of a source: the standard library, local files, a Hugging Face data set, or token files.

Every source is a stream, so a source larger than memory is read only as far as a run needs it. Rows that cannot become
documents are counted (`bad_rows.BadRows`) instead of raised.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import datasets
import httpx
from datasets.exceptions import DatasetsError
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document, content_origin
from sparsify.mixture.sources.readers import Report, read_rows
from sparsify.mixture.sources.rows import BadRowError, FieldReader, MissingColumnError
from sparsify.mixture.sources.source_files import (
    READ_ERRORS,
    TEXT_FORMATS,
    SourceFile,
    check_unchanged,
    source_files,
    text_chunks,
    without_duplicates,
)
from sparsify.mixture.sources.stdlib_text import stdlib_documents
from sparsify.mixture.sources.token_files import token_documents
from sparsify.recipe.source import SourceSection

MAX_TEXT_CHARACTERS = 1 << 26
"""Plain text that is longer than this without a separator becomes several documents."""
FIRST_ROWS = 100
"""A column that is missing in all of these first rows of a file is an error, not a series of bad rows."""


def read_documents(
    name: str,
    source: SourceSection,
    bad_rows: BadRows,
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    files: Sequence[SourceFile] | None = None,
    skip_documents: int = 0,
) -> Iterator[Document]:
    """Documents of one source, in the order of the source.

    Args:
        name: Name of the source in its mixture, for messages.
        source: Where the text is and which columns hold it.
        bad_rows: Counts the rows from the start of the source, including skipped documents.
        tokenizer: Needed for `token_files` only: its end-of-sequence token ends a document.
        files: The files as they were when the fingerprint was computed; default: as they are now.
        skip_documents: Documents at the start that are read but not yielded.

    Raises:
        MixtureError: If the source cannot be reached, lacks a column, holds no document or too many bad rows, or one of
            its files changes.
    """
    documents = _all_documents(name, source, bad_rows, tokenizer, files)
    yield from islice(documents, skip_documents, None)
    if not bad_rows.good_rows:
        check = "Check that its files are complete and in the format that their names say, "
        add = "add text to it, or remove it from the mixture."
        raise MixtureError(
            "\n".join([f"Source {name!r} holds no document.", *bad_rows.lines()]),
            next_step=(check + add if bad_rows.bad_rows else add.capitalize()),
        )
    bad_rows.check()


def _all_documents(
    name: str,
    source: SourceSection,
    bad_rows: BadRows,
    tokenizer: PreTrainedTokenizerFast | None,
    files: Sequence[SourceFile] | None,
) -> Iterator[Document]:
    if source.stdlib is not None:
        yield from _counted(stdlib_documents(source.stdlib), bad_rows)
        return
    if source.hub is not None:
        where = f"dataset {source.hub!r} of source {name!r}"
        fields = FieldReader(source)
        rows = enumerate(_hub_rows(name, source), start=1)
        yield from _row_documents(rows, fields, source.hub, where, bad_rows)
        return
    for file in without_duplicates(files or source_files(name, source), bad_rows):
        check_unchanged(name, file)
        if source.token_files:
            assert tokenizer is not None, "token files are cut into documents by their tokenizer"
            yield from _counted(token_documents(name, file, source, tokenizer), bad_rows)
        else:
            yield from file_documents(file, source, bad_rows)
        check_unchanged(name, file)


def file_documents(file: SourceFile, source: SourceSection, bad_rows: BadRows) -> Iterator[Document]:
    """Documents of one file of plain text or rows; the suffix decides how it is read.

    Raises:
        MixtureError: If the file lacks a column, or has too many bad rows.
    """
    report = partial(bad_rows.add, str(file.path))
    if file.format in TEXT_FORMATS:
        yield from _text_documents(file, source.document_separator, report, bad_rows)
    else:
        where = f"{file.path} of source {bad_rows.source!r}"
        fields = FieldReader(source)
        rows = read_rows(file, fields.columns, report)
        yield from _row_documents(rows, fields, str(file.path), where, bad_rows)


def _counted(documents: Iterable[Document], bad_rows: BadRows) -> Iterator[Document]:
    for document in documents:
        if document.num_characters:
            bad_rows.good_rows += 1
            yield document


def _row_documents(
    rows: Iterable[tuple[int, Any]], fields: FieldReader, file: str, where: str, bad_rows: BadRows
) -> Iterator[Document]:
    """Documents of the rows of one file or data set.

    Rows without their column are kept in `missing` until one row has it (then they are bad rows), or until FIRST_ROWS
    rows lack it (then the source's configuration is wrong).
    """
    columns_seen = False
    missing: list[tuple[int, MissingColumnError]] = []
    for number, row in rows:
        try:
            content = fields.read(row)
            if isinstance(content, str):
                document = Document(content_origin(content), text=content, file=file, row=number)
            else:
                origin = content_origin(*(message["content"] for message in content))
                document = Document(origin, messages=content, file=file, row=number)
        except BadRowError as error:
            if isinstance(error, MissingColumnError) and not columns_seen:
                missing.append((number, error))
                if len(missing) == FIRST_ROWS:
                    break
            else:
                columns_seen = columns_seen or error.reason is not Reason.NOT_AN_OBJECT
                bad_rows.add(file, error.reason, number, error.detail)
            continue
        except UnicodeEncodeError as error:
            columns_seen = True
            bad_rows.add(file, Reason.INVALID_UTF8, number, _not_utf8(error))
            continue
        if missing:
            _add_missing(missing, file, bad_rows)
        columns_seen = True
        bad_rows.good_rows += 1
        yield document
    if missing and not columns_seen:
        number, error = missing[0]
        raise MixtureError(
            f"{where}: row {number} has no column {error.column!r}, and neither has any of the first {len(missing)} row(s).",
            allowed=f"Its columns: {error.present}.",
            next_step="Set text_column, or prompt_column and response_column, or messages_column of the source.",
        )
    _add_missing(missing, file, bad_rows)


def _add_missing(missing: list[tuple[int, MissingColumnError]], file: str, bad_rows: BadRows) -> None:
    for number, error in missing:
        bad_rows.add(file, error.reason, number, error.detail)
    missing.clear()


def _not_utf8(error: UnicodeEncodeError) -> str:
    # A lone surrogate is an invalid byte, or was escaped in JSON.
    around = error.object[max(0, error.start - 20) : error.start + 20]
    return f"is not UTF-8 text at character {error.start:,}: {around!r}"


def _text_documents(file: SourceFile, separator: str, report: Report, bad_rows: BadRows) -> Iterator[Document]:
    number = 0
    try:
        for number, text in enumerate(_split_texts(file, separator), start=1):
            try:
                document = Document(content_origin(text), text=text, file=str(file.path), row=number)
            except UnicodeEncodeError as error:
                report(Reason.INVALID_UTF8, number, _not_utf8(error))
                continue
            bad_rows.good_rows += 1
            yield document
    except READ_ERRORS as error:
        cause = str(error) or type(error).__name__
        report(Reason.BROKEN_FILE, number, f"is the last readable document: {cause}")


def _split_texts(file: SourceFile, separator: str) -> Iterator[str]:
    """Documents of plain text, read in chunks: a file may be larger than memory."""
    pieces: list[str] = []
    held = 0
    tail = ""  # may be the start of a separator that the next chunk completes
    for chunk in text_chunks(file):
        *complete, rest = (tail + chunk).split(separator)
        for text in complete:
            yield from _nonempty("".join([*pieces, text]))
            pieces, held = [], 0
        cut = max(0, len(rest) - len(separator) + 1)
        pieces.append(rest[:cut])
        tail, held = rest[cut:], held + cut
        if held > MAX_TEXT_CHARACTERS:
            yield from _nonempty("".join(pieces))
            pieces, held = [], 0
    yield from _nonempty("".join([*pieces, tail]))


def _nonempty(text: str) -> Iterator[str]:
    if text.strip():
        yield text.strip("\n")


def _hub_rows(name: str, source: SourceSection) -> Iterator[Any]:
    try:
        stream = datasets.load_dataset(
            str(source.hub),
            source.hub_config,
            split=source.hub_split,
            revision=source.hub_revision,
            streaming=True,
        )
        yield from stream
    except (
        OSError,
        ValueError,
        DatasetsError,
        httpx.HTTPError,
    ) as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MixtureError(
            f"Source {name!r}: the dataset {source.hub!r} cannot be read from the Hub: {first_line}",
            allowed="A public dataset id, or a private one after `hf auth login`; only cached ones with HF_HUB_OFFLINE=1.",
            next_step="Check hub, hub_config, hub_split and hub_revision, or use local files.",
        ) from error
