"""Reads the documents of a source: the standard library, local files, a Hugging Face data set, or token files.

Every source is a stream, so a source larger than memory is read only as far as a run needs it. Rows that cannot become
documents are counted (`bad_rows.BadRows`) instead of raised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.bad_rows import BadRows, Reason
from sparsify.mixture.sources.documents import Document, content_origin, message_text
from sparsify.mixture.sources.readers import Report, read_rows
from sparsify.mixture.sources.rows import BadRowError, FieldReader, MissingColumnError, tools_of
from sparsify.mixture.sources.source_files import (
    READ_ERRORS,
    TEXT_FORMATS,
    SourceFile,
    check_unchanged,
    damage,
    disk_errors,
    source_files,
    text_chunks,
    without_duplicates,
)
from sparsify.mixture.sources.stdlib_text import stdlib_documents
from sparsify.recipe.source import SourceSection

MAX_TEXT_CHARACTERS = 1 << 26
"""Plain text that is longer than this without a separator becomes several documents."""
UTF16_NULS = 0.25
"""Share of NUL characters from which a text is taken for UTF-16; of English it is a half."""
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
    """Documents of one source, in its order; the first `skip_documents` are read, so that their bad rows count, but not
    yielded. `files` are as they were when the fingerprint was computed. Raises MixtureError if the source cannot be
    reached or read, lacks a column, holds no document or too many bad rows, or one of its files changes.
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
            with disk_errors(file.path):
                yield from _counted(token_documents(name, file, source, tokenizer), bad_rows)
        else:
            yield from file_documents(file, source, bad_rows)
        check_unchanged(name, file)


def file_documents(file: SourceFile, source: SourceSection, bad_rows: BadRows) -> Iterator[Document]:
    """Documents of one file of plain text or rows; the suffix decides how it is read. Raises MixtureError if it lacks a
    column, or has too many bad rows.
    """
    report = partial(bad_rows.add, str(file.path))
    with disk_errors(file.path):
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
            _check_nul(content if isinstance(content, str) else "".join(map(message_text, content)))
            if isinstance(content, str):
                document = Document(content_origin(content), text=content, file=file, row=number)
            else:
                tools = tools_of(row) if fields.reads_tools else None
                origin = content_origin(*map(message_text, content))
                document = Document(origin, messages=content, tools=tools, file=file, row=number)
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


def _check_nul(text: str) -> None:
    nuls = text.count("\0")
    if nuls:
        advice = "remove them, for example with tr -d '\\000'"
        if nuls >= UTF16_NULS * len(text):
            order = "LE" if text[1::2].count("\0") > text[::2].count("\0") else "BE"
            advice = f"UTF-16 without a byte order mark? Convert it to UTF-8: iconv -f UTF-16{order} -t UTF-8"
        raise BadRowError(Reason.NUL, f"has {nuls:,} NUL character(s) among {len(text):,}: {advice}")


def _not_utf8(error: UnicodeEncodeError) -> str:
    at, before = f"is not UTF-8 text at character {error.start:,}", error.object[max(0, error.start - 20) : error.start]
    code = ord(error.object[error.start])
    if 0xDC80 <= code <= 0xDCFF:  # the invalid byte 0x80 to 0xFF of a file
        return f"{at}: byte 0x{code - 0xDC00:02X} after {before!r}. If it is Latin-1: iconv -f LATIN1 -t UTF-8"
    return f"{at}: half of a surrogate pair, \\u{code:04x}, after {before!r}"


def _text_documents(file: SourceFile, separator: str, report: Report, bad_rows: BadRows) -> Iterator[Document]:
    number = 0
    try:
        for number, text in enumerate(split_texts(text_chunks(file), separator), start=1):
            try:
                _check_nul(text)
                document = Document(content_origin(text), text=text, file=str(file.path), row=number)
            except UnicodeEncodeError as error:
                report(Reason.INVALID_UTF8, number, _not_utf8(error))
                continue
            except BadRowError as error:
                report(error.reason, number, error.detail)
                continue
            bad_rows.good_rows += 1
            yield document
    except READ_ERRORS as error:
        report(Reason.BROKEN_FILE, number, f"is the last readable document: {damage(error)}")


def split_texts(chunks: Iterable[str], separator: str) -> Iterator[str]:
    """Documents of plain text that comes in chunks: a file may be larger than memory."""
    pieces: list[str] = []
    held = 0
    tail = ""  # may be the start of a separator that the next chunk completes
    for chunk in chunks:
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
    import datasets  # half a second, and hardly any source needs it
    from datasets.exceptions import DatasetsError

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


Ids = NDArray[np.integer]


def token_documents(
    name: str,
    file: SourceFile,
    source: SourceSection,
    tokenizer: PreTrainedTokenizerFast,
    *,
    chunk_tokens: int = 1 << 20,
    max_document_tokens: int = 1 << 25,
) -> Iterator[Document]:
    """Documents of one file of token ids: `.npy`, or `.bin` with raw ids of type `source.token_dtype`.

    More than `max_document_tokens` without an end show that another tokenizer made the file.

    Raises:
        MixtureError: If the file has another type, or holds ids that the tokenizer does not have.
    """
    ids = _open(name, file, source)
    end = tokenizer.eos_token_id
    pieces: list[Ids] = []
    held = number = 0
    for start in range(0, len(ids), chunk_tokens):
        chunk = np.array(ids[start : start + chunk_tokens])
        _check_vocabulary(name, file, chunk, start, len(tokenizer))
        first = 0
        for stop in np.flatnonzero(chunk == end).tolist():
            number += 1
            pieces.append(chunk[first:stop])
            yield from _document(pieces, file, number)
            pieces, held, first = [], 0, stop + 1
        pieces.append(chunk[first:])
        held += len(chunk) - first
        if held > max_document_tokens:
            raise MixtureError(
                f"Source {name!r}: {file.path} has {held:,} tokens in a row without the end-of-sequence token {end}.",
                allowed=f"Documents of at most {max_document_tokens:,} tokens, each ended by it.",
                next_step="Use the tokenizer that the file was made with, or check token_dtype.",
            )
    yield from _document(pieces, file, number + 1)


def _open(name: str, file: SourceFile, source: SourceSection) -> NDArray[np.integer]:
    stated = np.dtype(source.token_dtype) if source.token_dtype else None
    if file.format == ".npy":
        try:
            ids = np.load(file.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise _not_tokens(name, file, f"cannot be read: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "iu" or stated not in (None, ids.dtype):
            raise _not_tokens(name, file, f"holds an array {list(ids.shape)} of {ids.dtype}")
        return ids
    if stated is None:
        raise _not_tokens(name, file, "has no stated number type")
    if file.num_bytes % stated.itemsize:
        raise _not_tokens(name, file, f"has {file.num_bytes:,} bytes, which is not a whole number of {stated}")
    if not file.num_bytes:
        return np.empty(0, dtype=stated)
    return np.memmap(file.path, dtype=stated, mode="r")


def _not_tokens(name: str, file: SourceFile, what: str) -> MixtureError:
    return MixtureError(
        f"Source {name!r}: {file.path} {what}.",
        allowed=".npy with a one-dimensional array of integers, or .bin with token_dtype uint16 or uint32.",
        next_step=f"Set mixture.sources.{name}.token_dtype, or write the file again.",
    )


def _check_vocabulary(
    name: str, file: SourceFile, chunk: NDArray[np.integer], start: int, vocabulary_size: int
) -> None:
    wrong = np.flatnonzero((chunk < 0) | (chunk >= vocabulary_size))
    if len(wrong):
        place = int(wrong[0])
        raise MixtureError(
            f"Source {name!r}: token {start + place:,} of {file.path} is {int(chunk[place]):,}.",
            allowed=f"The tokenizer has ids 0 to {vocabulary_size - 1:,}.",
            next_step="Use the tokenizer that the file was made with, or check token_dtype.",
        )


def _document(pieces: list[Ids], file: SourceFile, number: int) -> Iterator[Document]:
    ids = np.concatenate(pieces).astype(np.uint32) if pieces else np.empty(0, dtype=np.uint32)
    if len(ids):
        origin = hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest()
        yield Document(origin, token_ids=ids, file=str(file.path), row=number)
