"""A mixture's text written out as JSON lines, so that both sides of a benchmark read the same files."""

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
"""Of English under a usual vocabulary; decides only how much text is written out."""
FILE_CHARACTERS = 1 << 20
"""Data sets come in many files; in one, `datasets` would shuffle 10 MB at once whatever its buffer."""


@dataclass(frozen=True)
class Corpus:
    """The files of a benchmark: rows of `document` (a number of its own) and `text`.

    Attributes:
        name: The mixture's name.
        folder: Where they are; a place for caches too.
        paths: Files of each source that has a share, in order.
        shares: Asked share of tokens of each source; they sum to 1.
        first_document: Number of each source's first document; the others follow.
        validation_fraction: The mixture's: our side holds these documents out.
    """

    name: str
    folder: Path
    paths: dict[str, list[Path]]
    shares: dict[str, float]
    first_document: dict[str, int]
    validation_fraction: float

    @property
    def mixture(self) -> MixtureSection:
        """The same as a mixture."""
        sources = {
            name: SourceSection(token_share=self.shares[name], files=[*map(str, paths)])
            for name, paths in self.paths.items()
        }
        return MixtureSection(
            name=self.name, sources=sources, validation_fraction=self.validation_fraction
        )

    @property
    def num_bytes(self) -> int:
        """Size of all files."""
        return sum(path.stat().st_size for paths in self.paths.values() for path in paths)

    def texts(self, name: str, num_documents: int) -> list[str]:
        """The first texts of a source."""
        rows = (json.loads(line) for path in self.paths[name] for line in _lines(path))
        return [row["text"] for row in islice(rows, num_documents)]


def write_corpus(mixture: MixtureSection, folder: Path, budget_tokens: int) -> Corpus:
    """Writes out what a run of `budget_tokens` could read of each source, whoever draws it.

    The turns of an instruction document stand one after another as plain text.

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
            rows = ({"document": number + place, "text": text} for place, text in enumerate(texts))
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
