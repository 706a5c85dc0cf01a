"""Which evaluation items the instruction data of a run holds: 13 words in a row, as decontamination counts them."""

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
"""Of each source; a mixture may hold more instructions than anyone wants to read for a table."""


def write_texts(folder: Path, task: str, texts: Sequence[str]) -> None:
    """Keeps the text of a task's items, for `overlaps`."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    write_text(_texts_path(folder, task), lines)


def overlaps(
    folder: Path, tasks: Sequence[str], mixture: MixtureSection, sources: Sequence[str]
) -> dict[str, list[SourceOverlap]]:
    """For each task, what each of some sources of a mixture shares with its items.

    Documents that the mixture holds out, or leaves out as contaminated, are not counted: nothing was trained on them.

    Args:
        folder: Where `write_texts` wrote.
        tasks: The tasks.
        mixture: What the model was trained on.
        sources: Names of the sources to look through.
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
    """Documents read, how many hit each file, the items found, and why the source could not be read whole, if so."""
    num_documents = 0
    hits: dict[int, int] = {}
    items: set[tuple[int, int]] = set()
    try:
        # A copy that moved since must not hide the scores; that nothing is known is said instead.
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
        left_out = cleaner.overlaps(documents) if cleaner else [None] * len(documents)
        for document, overlap in zip(documents, left_out, strict=True):
            if overlap is None and not is_held_out(document.origin, mixture.validation_fraction):
                yield document


def _texts_path(folder: Path, task: str) -> Path:
    return folder / TEXTS_FOLDER / f"{task}.jsonl"
