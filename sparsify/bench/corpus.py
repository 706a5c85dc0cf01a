"""A mixture's text as JSON lines, so that both sides of a benchmark read the same files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from sparsify.mixture.sequences.shares import token_shares
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.documents import Document
from sparsify.mixture.sources.read import read_documents
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection

CHARACTERS_PER_TOKEN = 4
"""Approximate ratio for English; only decides how much text is written."""
FILE_CHARACTERS = 1 << 20
"""Characters per file; `datasets` shuffles a single file in blocks of 10 MB, whatever its buffer."""


@dataclass(frozen=True)
class Corpus:
    """The files of a benchmark, with rows of `document` (a unique number) and `text`.

    Attributes:
        paths: Files of each source with a share above 0, in order.
        shares: Planned token share of each source; they sum to 1.
        first_document: Number of each source's first document; a source's documents are numbered consecutively.
        validation_fraction: Share of documents that our side holds out.
    """

    name: str
    folder: Path
    paths: dict[str, list[Path]]
    shares: dict[str, float]
    first_document: dict[str, int]
    validation_fraction: float

    @property
    def mixture(self) -> MixtureSection:
        sources = {
            name: SourceSection(token_share=self.shares[name], files=[*map(str, paths)])
            for name, paths in self.paths.items()
        }
        return MixtureSection(name=self.name, sources=sources, validation_fraction=self.validation_fraction)

    @property
    def num_bytes(self) -> int:
        return sum(path.stat().st_size for paths in self.paths.values() for path in paths)

    def texts(self, name: str, num_documents: int) -> list[str]:
        rows = (json.loads(line) for path in self.paths[name] for line in _lines(path))
        return [row["text"] for row in islice(rows, num_documents)]


def write_corpus(mixture: MixtureSection, folder: Path, budget_tokens: int) -> Corpus:
    """Writes as much text of each source as a run of `budget_tokens` could read at most.

    The turns of an instruction document are joined to plain text.

    Raises:
        MixtureError: If a source cannot be read.
    """
    shares = token_shares(mixture)
    paths: dict[str, list[Path]] = {}
    first_document: dict[str, int] = {}
    number = 0
    for name in shares:
        first_document[name], paths[name] = number, []
        bad_rows = BadRows(name, mixture.max_bad_fraction)
        documents = read_documents(name, mixture.sources[name], bad_rows)
        for texts in _files(_texts_up_to(documents, CHARACTERS_PER_TOKEN * budget_tokens)):
            path = folder / f"{name}-{len(paths[name]):05d}.jsonl"
            rows = ({"document": number + index, "text": text} for index, text in enumerate(texts))
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            paths[name].append(path)
            number += len(texts)
    return Corpus(mixture.name, folder, paths, shares, first_document, mixture.validation_fraction)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


def _texts_up_to(documents: Iterator[Document], num_characters: int) -> Iterator[str]:
    written = 0
    for document in documents:
        turns = document.messages or ()
        text = document.text or "\n".join(turn["content"] for turn in turns)
        yield text
        written += len(text)
        if written >= num_characters:
            return


def _files(texts: Iterator[str]) -> Iterator[list[str]]:
    part: list[str] = []
    num_characters = 0
    for text in texts:
        part.append(text)
        num_characters += len(text)
        if num_characters >= FILE_CHARACTERS:
            yield part
            part, num_characters = [], 0
    if part:
        yield part
