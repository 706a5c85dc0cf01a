"""What of a source is not trained on, counted for people: bad rows, duplicates, overlaps with evaluation sets."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict

from sparsify.mixture.contamination import REPORT_FILE, contamination_report
from sparsify.mixture.duplicates import DIGESTS_FILE, DUPLICATE
from sparsify.mixture.ingest import QUARANTINE_FILE, bad_rows_of
from sparsify.mixture.tokens import TokenizedSource


class LeftOut(BaseModel):
    """Counts over the documents of a source that were read so far.

    Attributes:
        bad_rows: Rows that could not be used; None before the source was read as far as a run needed it.
        duplicates: Documents whose content an earlier one has; None where duplicates are kept.
        contaminated: Documents that overlap with an evaluation item; None where nothing is compared.
        notes: A line each for what was left out, with the file that says more.
    """

    model_config = ConfigDict(frozen=True)

    bad_rows: int | None
    duplicates: int | None
    contaminated: int | None
    notes: list[str]

    @classmethod
    def of(cls, source: TokenizedSource) -> LeftOut:
        """Counts what the cache of a source recorded."""
        folder, notes = source.cache.folder, []
        num_read = source.cache.records[-1].read_documents
        bad_rows = bad_rows_of(source)
        if bad_rows is not None and (bad_rows.num_bad_rows or bad_rows.duplicate_files):
            notes.append(f"{bad_rows.summary()}: {folder / QUARANTINE_FILE}")
        duplicates = None
        if (folder / DIGESTS_FILE).is_file():
            digests = np.fromfile(folder / DIGESTS_FILE, dtype=np.uint64, count=num_read)
            duplicates = int(np.count_nonzero(digests == DUPLICATE))
            if duplicates:
                notes.append(
                    f"{source.name}: {duplicates:,} of {num_read:,} documents are duplicates of earlier ones"
                )
        report = contamination_report(folder, num_read)
        if report is not None and report.documents_left_out:
            notes.append(
                f"{source.name}: {report.documents_left_out:,} of {num_read:,} documents overlap with "
                f"evaluation items: {folder / REPORT_FILE}"
            )
        return cls(
            bad_rows=bad_rows.num_bad_rows if bad_rows else None,
            duplicates=duplicates,
            contaminated=report.documents_left_out if report else None,
            notes=notes,
        )
