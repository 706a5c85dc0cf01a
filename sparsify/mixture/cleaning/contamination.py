"""What decontamination drops from a source: a log that is written during ingest, and a report made from it.

The first line of `contamination.jsonl` lists the evaluation files; each further line is a dropped document with its
number in the source. Like the tokens, the log can be truncated to any number of documents and continued from there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel, ValidationError

from sparsify.files import write_text
from sparsify.mixture.cleaning.decontaminate import Decontaminator, Overlap
from sparsify.mixture.sources.documents import Document

LOG_FILE, REPORT_FILE = "contamination.jsonl", "contamination.json"
EXAMPLES_PER_FILE = 5


class ContaminationExample(BaseModel):
    document: int
    """Number of the document in the source, from 0, counted before anything is dropped."""
    origin: str
    ngram: str
    """The first n-gram that the document shares with an evaluation item."""
    excerpt: str
    """The document's words around the n-gram."""
    evaluation_file: str
    item: int
    """Number of the item in that file, from 0."""


class EvaluationFileReport(BaseModel):
    path: str
    items: int
    short_items: int
    """Items of fewer than 8 words, which are not compared."""
    documents_dropped: int
    """Training documents that overlap with an item of this file."""
    items_found: int
    """Items that a training document overlaps with."""


class ContaminationReport(BaseModel):
    """What decontamination dropped from the first documents of a source."""

    documents_read: int
    """Documents of the source, counted before anything is dropped."""
    documents_dropped: int
    common_ngrams: int
    """N-grams that occur in too many items to identify one (MAX_NGRAM_ITEMS); they are not compared."""
    evaluation_files: list[EvaluationFileReport]
    examples: list[ContaminationExample]


class _Header(BaseModel):
    paths: list[str]
    items: list[int]
    short_items: list[int]
    common_ngrams: int


class _DroppedDocument(BaseModel):
    document: int
    items: list[tuple[int, int]]
    example: ContaminationExample | None = None


class ContaminationLog:
    """Writes the log of one source. Another decontaminator needs another folder.

    Raises:
        ValueError: If the log of these documents is missing. Then the source must be read from its start.
    """

    def __init__(self, folder: Path, decontaminator: Decontaminator, num_documents: int) -> None:
        self._folder, self._files = folder, [str(file.path) for file in decontaminator.files]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / LOG_FILE
        header = _Header(
            paths=self._files,
            items=[file.num_items for file in decontaminator.files],
            short_items=[file.num_short_items for file in decontaminator.files],
            common_ngrams=decontaminator.num_common_ngrams,
        )
        self._examples = Counter[str]()
        first_line = f"{header.model_dump_json()}\n"
        if not num_documents:
            write_text(path, first_line)
        elif not path.exists() or path.open(encoding="utf-8").readline() != first_line:
            raise ValueError(f"{path} is missing or was written for other evaluation files")
        kept = len(first_line.encode())
        for one, line_bytes in _lines(path, num_documents):
            kept += line_bytes
            if one.example is not None:
                self._examples[one.example.evaluation_file] += 1
        self._log = path.open("ab")
        self._log.truncate(kept)

    def add(self, document: Document, number: int, overlap: Overlap) -> None:
        """Logs a dropped document; `number` is its number in the source."""
        example = None
        evaluation_file = self._files[overlap.file]
        if self._examples[evaluation_file] < EXAMPLES_PER_FILE:
            self._examples[evaluation_file] += 1
            example = ContaminationExample(
                document=number,
                origin=document.origin,
                ngram=overlap.ngram,
                excerpt=overlap.excerpt,
                evaluation_file=evaluation_file,
                item=overlap.item,
            )
        dropped = _DroppedDocument(document=number, items=list(overlap.items), example=example)
        self._log.write(f"{dropped.model_dump_json(exclude_none=True)}\n".encode())

    def commit(self) -> None:
        self._log.flush()
        os.fsync(self._log.fileno())

    def close(self) -> None:
        self._log.close()


def contamination_report(folder: Path, num_documents: int) -> ContaminationReport | None:
    """What decontamination dropped from the first documents of a source; None if it is compared with no evaluation set."""
    path = folder / LOG_FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        header = _Header.model_validate_json(file.readline())
    documents, items = Counter[int](), set[tuple[int, int]]()
    examples: list[ContaminationExample] = []
    num_dropped = 0
    for one, _ in _lines(path, num_documents):
        num_dropped += 1
        documents.update({file for file, _ in one.items})
        items.update(one.items)
        if one.example is not None:
            examples.append(one.example)
    found = Counter(file for file, _ in items)
    return ContaminationReport(
        documents_read=num_documents,
        documents_dropped=num_dropped,
        common_ngrams=header.common_ngrams,
        evaluation_files=[
            EvaluationFileReport(
                path=path,
                items=header.items[file],
                short_items=header.short_items[file],
                documents_dropped=documents[file],
                items_found=found[file],
            )
            for file, path in enumerate(header.paths)
        ],
        examples=examples,
    )


def _lines(path: Path, num_documents: int) -> Iterator[tuple[_DroppedDocument, int]]:
    """Entries of documents below `num_documents`, with the bytes of their lines.

    Stops at an incomplete line, which a killed process left: its document is read again.
    """
    with path.open("rb") as file:
        file.readline()
        for line in file:
            try:
                one = _DroppedDocument.model_validate_json(line)
            except ValidationError:
                return
            if one.document >= num_documents or not line.endswith(b"\n"):
                return
            yield one, len(line)
