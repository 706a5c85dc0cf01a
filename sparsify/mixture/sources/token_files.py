"""Pre-tokenised documents: files of token ids in which the end-of-sequence token ends each document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.source_files import SourceFile
from sparsify.recipe.source import SourceSection

CHUNK_TOKENS = 1 << 20
MAX_DOCUMENT_TOKENS = 1 << 25

Ids = NDArray[np.integer]


def token_documents(
    name: str, file: SourceFile, source: SourceSection, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Document]:
    """Documents of one file of token ids: `.npy`, or `.bin` with raw ids of type `source.token_dtype`.

    Raises:
        MixtureError: If the file has another type, or holds ids that the tokenizer does not have.
    """
    ids = _open(name, file, source)
    end = tokenizer.eos_token_id
    pieces: list[Ids] = []
    held = number = 0
    for start in range(0, len(ids), CHUNK_TOKENS):
        chunk = np.array(ids[start : start + CHUNK_TOKENS])
        _check_vocabulary(name, file, chunk, start, len(tokenizer))
        first = 0
        for stop in np.flatnonzero(chunk == end).tolist():
            number += 1
            pieces.append(chunk[first:stop])
            yield from _document(pieces, file, number)
            pieces, held, first = [], 0, stop + 1
        pieces.append(chunk[first:])
        held += len(chunk) - first
        if held > MAX_DOCUMENT_TOKENS:
            raise MixtureError(
                f"Source {name!r}: {file.path} has {held:,} tokens in a row without the end-of-sequence token {end}.",
                allowed=f"Documents of at most {MAX_DOCUMENT_TOKENS:,} tokens, each ended by it.",
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
