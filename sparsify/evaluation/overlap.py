"""Evaluation items that occur in the instruction data of a run: 13 words in a row, as in decontamination."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from sparsify.errors import UserError
from sparsify.evaluation.results import TEXTS_FOLDER, SourceOverlap
from sparsify.files import write_text
from sparsify.mixture.cleaning.decontaminate import Decontaminator
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.documents import Document, is_held_out
from sparsify.mixture.sources.read import read_documents
from sparsify.mixture.tokens.pool import batches
from sparsify.recipe.mixture import MixtureSection

MAX_DOCUMENTS = 100_000
"""Documents read per source, so that a large source does not delay the table."""


def write_texts(folder: Path, task: str, texts: Sequence[str]) -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_text(_texts_path(folder, task), lines)


def overlaps(
    folder: Path, tasks: Sequence[str], mixture: MixtureSection, sources: Sequence[str]
) -> dict[str, list[SourceOverlap]]:
    """For each task, the overlap of its items with each given source of a mixture.

    Documents that the mixture holds out or drops as contaminated are not counted: nothing was trained on them.
    """
    paths = {task: _texts_path(folder, task) for task in tasks}
    paths = {task: path for task, path in paths.items() if path.is_file()}
    finder = Decontaminator(paths.values())
    found: dict[str, list[SourceOverlap]] = {task: [] for task in tasks}
    for source in sources:
        documents, hits, items, problem = _search(finder, mixture, source)
        for number, (task, file) in enumerate(zip(paths, finder.files, strict=True)):
            found[task].append(
                SourceOverlap(
                    source=source,
                    documents_read=documents,
                    documents_overlapping=hits.get(number, 0),
                    items=file.num_items,
                    items_found=sum(1 for one, _ in items if one == number),
                    problem=problem,
                )
            )
    return found


def _search(
    finder: Decontaminator, mixture: MixtureSection, source: str
) -> tuple[int, dict[int, int], set[tuple[int, int]], str | None]:
    """Documents read, overlapping documents by file, items found, and the problem that ended the reading, if any."""
    num_documents = 0
    hits: dict[int, int] = {}
    items: set[tuple[int, int]] = set()
    try:
        # Source files may have moved since the training: report the problem rather than fail after the evaluation.
        for documents in batches(islice(_trained_on(mixture, source), MAX_DOCUMENTS)):
            num_documents += len(documents)
            for overlap in finder.overlaps(documents):
                if overlap is not None:
                    items.update(overlap.items)
                    for file in {file for file, _ in overlap.items}:
                        hits[file] = hits.get(file, 0) + 1
    except UserError as error:
        return num_documents, hits, items, error.given
    return num_documents, hits, items, None


def _trained_on(mixture: MixtureSection, source: str) -> Iterator[Document]:
    cleaner = Decontaminator.of(mixture)
    settings = mixture.sources[source]
    bad_rows = BadRows(source, mixture.max_bad_fraction)
    for documents in batches(read_documents(source, settings, bad_rows)):
        contaminated = cleaner.overlaps(documents) if cleaner else [None] * len(documents)
        for document, overlap in zip(documents, contaminated, strict=True):
            if overlap is None and not is_held_out(document.origin, mixture.validation_fraction):
                yield document


def _texts_path(folder: Path, task: str) -> Path:
    return folder / TEXTS_FOLDER / f"{task}.jsonl"
