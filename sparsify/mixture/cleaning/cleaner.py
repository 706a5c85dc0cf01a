"""Drops documents that must not be trained on: exact duplicates, and overlaps with evaluation items."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sparsify.files import write_text
from sparsify.mixture.cleaning.contamination import (
    REPORT_FILE,
    ContaminationLog,
    contamination_report,
)
from sparsify.mixture.cleaning.decontaminate import Decontaminator
from sparsify.mixture.cleaning.duplicates import SeenDocuments
from sparsify.mixture.sources.documents import Document
from sparsify.recipe.mixture import MixtureSection


class Cleaner:
    """Filters the documents of one source as they are read; can resume after any number of documents.

    Args:
        mixture: Says which documents are dropped.
        folder: The source's cache folder, which holds the logs of earlier documents.
        num_documents: Documents that were read before; log entries of later ones are discarded.

    Raises:
        MixtureError: If an evaluation file is missing or cannot be read.
        ValueError: If a log is missing. Then the source must be read from its start.
    """

    def __init__(self, mixture: MixtureSection, folder: Path, num_documents: int) -> None:
        self._folder = folder
        self.num_documents = num_documents
        self._decontaminator = Decontaminator.of(mixture)
        self._seen = SeenDocuments(folder, num_documents) if mixture.remove_duplicates else None
        self._log = None
        if self._decontaminator is not None:
            self._log = ContaminationLog(folder, self._decontaminator, num_documents)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def num_duplicates(self) -> int:
        """Documents dropped because an earlier one has the same content."""
        return self._seen.num_duplicates if self._seen else 0

    def clean(self, documents: Sequence[Document]) -> list[Document]:
        """Returns the documents to train on. Must be called with every document, in the order of the source."""
        numbered = list(enumerate(documents, start=self.num_documents))
        self.num_documents += len(documents)
        if self._seen is not None:
            new = self._seen.add(documents)
            numbered = [one for one, is_new in zip(numbered, new, strict=True) if is_new]
        if self._decontaminator is None or self._log is None:
            return [document for _, document in numbered]
        kept = []
        overlaps = self._decontaminator.overlaps([document for _, document in numbered])
        for (number, document), overlap in zip(numbered, overlaps, strict=True):
            if overlap is None:
                kept.append(document)
            else:
                self._log.add(document, number, overlap)
        return kept

    def commit(self) -> None:
        """Flushes the logs to disk. Call it before recording elsewhere that these documents were read."""
        if self._seen is not None:
            self._seen.commit()
        if self._log is not None:
            self._log.commit()

    def finish(self, num_documents: int) -> None:
        """Commits, and writes the `ContaminationReport` of the first documents if there are evaluation sets."""
        self.commit()
        report = contamination_report(self._folder, num_documents) if self._log else None
        if report is not None:
            write_text(self._folder / REPORT_FILE, report.model_dump_json(indent=2) + "\n")

    def close(self) -> None:
        if self._seen is not None:
            self._seen.close()
        if self._log is not None:
            self._log.close()
