"""Documents in batches, and batches in parts."""

from __future__ import annotations

from collections.abc import Iterator

from sparsify.mixture.documents import Document

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 22
"""Whichever comes first ends a batch. A shard ends with a batch, so its documents depend on them."""
PART_DOCUMENTS, PART_CHARACTERS = 64, 1 << 18
"""The same of a part of a batch, which is tokenised at once; nothing depends on them but speed."""


def batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Batches small enough for memory, whatever the length of documents."""
    batch: list[Document] = []
    for part, ends_batch in parts(documents):
        batch += part
        if ends_batch:
            yield batch
            batch = []


def parts(documents: Iterator[Document]) -> Iterator[tuple[list[Document], bool]]:
    """Batches in parts, and whether a part ends its batch: the first is tokenised while the second is read."""
    part: list[Document] = []
    num_documents = num_characters = 0
    part_documents = part_characters = 0
    for document in documents:
        part.append(document)
        num_documents += 1
        num_characters += document.num_characters
        ends_batch = num_documents == BATCH_DOCUMENTS or num_characters >= BATCH_CHARACTERS
        if (
            ends_batch
            or num_documents - part_documents == PART_DOCUMENTS
            or num_characters - part_characters >= PART_CHARACTERS
        ):
            yield part, ends_batch
            part = []
            if ends_batch:
                num_documents = num_characters = 0
            part_documents, part_characters = num_documents, num_characters
    if num_documents:
        yield part, True
