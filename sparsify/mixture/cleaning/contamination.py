"""What decontamination left out of a source: a log while it is ingested, and the report that is made of it.

`contamination.jsonl` begins with the evaluation files; then comes a line for each document that was left out, with its
number in the source. So the log, like the tokens, can be cut to any number of documents and gone on from there.
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
    """A document that was left out, and why."""

    document: int
    """Its number in the source, from 0, before anything is left out."""
    origin: str
    ngram: str
    """The first words that it shares with an evaluation item."""
    excerpt: str
    """The document's words around them."""
    evaluation_file: str
    item: int
    """Number of the item in that file, from 0."""


class EvaluationFileReport(BaseModel):
    """What one evaluation file did to a source."""

    path: str
    items: int
    short_items: int
    """Items of fewer than 8 words, which nothing is compared with."""
    documents_left_out: int
    """Training documents that overlap with an item of this file."""
    items_found: int
    """Items that a training document overlaps with."""


class ContaminationReport(BaseModel):
    """What decontamination left out of the first documents of a source."""

    documents_read: int
    """Documents of the source, before anything is left out."""
    documents_left_out: int
    common_ngrams: int
    """N-grams of so many items that they are not theirs; nothing is compared with them."""
    evaluation_files: list[EvaluationFileReport]
    examples: list[ContaminationExample]


class _Header(BaseModel):
    paths: list[str]
    items: list[int]
    short_items: list[int]
    common_ngrams: int


class _LeftOut(BaseModel):
    document: int
    items: list[tuple[int, int]]
    example: ContaminationExample | None = None


class ContaminationLog:
    """Writes the log of one source.

    Args:
        folder: Where it is, or will be.
        decontaminator: What finds the overlaps. Another one must have another folder.
        num_documents: Go on as of the moment when this many documents of the source had been read.

    Raises:
        ValueError: If the log of these documents is missing. Then the source must be read from its beginning.
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
        self.num_documents = 0
        """Documents that were left out."""
        first_line = f"{header.model_dump_json()}\n"
        if not num_documents:
            write_text(path, first_line)
        elif not path.exists() or path.open(encoding="utf-8").readline() != first_line:
            raise ValueError(f"{path} is missing or was written for other evaluation files")
        kept = len(first_line.encode())
        for one, line_bytes in _lines(path, num_documents):
            kept += line_bytes
            self.num_documents += 1
            if one.example is not None:
                self._examples[one.example.evaluation_file] += 1
        self._log = path.open("ab")
        self._log.truncate(kept)

    def add(self, document: Document, number: int, overlap: Overlap) -> None:
        """Takes down a document that is left out; `number` is its number in the source."""
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
        left_out = _LeftOut(document=number, items=list(overlap.items), example=example)
        self._log.write(f"{left_out.model_dump_json(exclude_none=True)}\n".encode())
        self.num_documents += 1

    def commit(self) -> None:
        """Puts what was taken down on the disk."""
        self._log.flush()
        os.fsync(self._log.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._log.close()


def contamination_report(folder: Path, num_documents: int) -> ContaminationReport | None:
    """What decontamination left out of the first `num_documents` documents of the source whose cache folder this is.

    Returns:
        The report; None if the source is compared with no evaluation set.
    """
    path = folder / LOG_FILE
    if not path.exists():
        return None
    with path.open("rb") as file:
        header = _Header.model_validate_json(file.readline())
    documents, items = Counter[int](), set[tuple[int, int]]()
    examples: list[ContaminationExample] = []
    num_left_out = 0
    for one, _ in _lines(path, num_documents):
        num_left_out += 1
        documents.update({file for file, _ in one.items})
        items.update(one.items)
        if one.example is not None:
            examples.append(one.example)
    found = Counter(file for file, _ in items)
    return ContaminationReport(
        documents_read=num_documents,
        documents_left_out=num_left_out,
        common_ngrams=header.common_ngrams,
        evaluation_files=[
            EvaluationFileReport(
                path=path,
                items=header.items[file],
                short_items=header.short_items[file],
                documents_left_out=documents[file],
                items_found=found[file],
            )
            for file, path in enumerate(header.paths)
        ],
        examples=examples,
    )


def _lines(path: Path, num_documents: int) -> Iterator[tuple[_LeftOut, int]]:
    """The documents below this number, and the bytes of their lines. A torn line ends them: what it was is read anew."""
    with path.open("rb") as file:
        file.readline()
        for line in file:
            try:
                one = _LeftOut.model_validate_json(line)
            except ValidationError:
                return
            if one.document >= num_documents or not line.endswith(b"\n"):
                return
            yield one, len(line)
