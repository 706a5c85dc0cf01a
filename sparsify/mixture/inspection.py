"""Looking at a mixture before training on it: its sizes, and real windows as training would draw them.

What of a source is not trained on, counted for people: bad rows, duplicates, overlaps with evaluation sets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from sparsify.mixture.cleaning.contamination import REPORT_FILE, contamination_report
from sparsify.mixture.cleaning.duplicates import count_duplicates
from sparsify.mixture.sequences.reader import NO_LOSS, Window, read_window
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import (
    QUARANTINE_FILE,
    Progress,
    bad_rows_of,
    mixture_ingests,
)
from sparsify.mixture.tokens.tokenized_source import (
    ShardDocuments,
    TokenizedSource,
)
from sparsify.recipe.recipe import MixtureSection, token_shares


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
        duplicates = count_duplicates(folder, num_read)
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


class SourceStats(BaseModel):
    """Sizes of one source, as far as a budget reads it. Counts are of training documents unless they say otherwise."""

    group: str
    planned_tokens: int
    """What the budget draws of it."""
    documents: int
    tokens: int
    held_out_tokens: int
    complete: bool
    """Whether this is all of the source."""
    tokens_per_document_p5: int
    tokens_per_document_p50: int
    tokens_per_document_p95: int
    windows: int
    """Windows of one epoch."""
    packing_efficiency: float
    """Share of window positions that carry tokens."""
    loss_share: float
    """Share of tokens that carry loss."""
    epochs: float
    """How often the budget sees each document."""
    left_out: LeftOut
    """What of the source is not trained on."""


class MixtureStats(BaseModel):
    """Sizes of a mixture at a budget."""

    mixture: str
    budget_tokens: int
    window_tokens: int
    sources: dict[str, SourceStats]


def open_mixture(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    train_tokens: Mapping[str, int],
    window_tokens: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> dict[str, TokenizedSource]:
    """Tokenises, in this process, so many training tokens of every source.

    Raises:
        MixtureError: If a source cannot supply its tokens.
        StorageError: If the cache cannot be written.
    """
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens=train_tokens,
        held_out_tokens=window_tokens,
        window_tokens=window_tokens,
        cache_dir=cache_dir,
    )
    return {name: ingest.run(on_progress) for name, ingest in ingests.items()}


def measure_mixture(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    budget_tokens: int,
    window_tokens: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> MixtureStats:
    """Counts a mixture as far as a budget reads it, tokenising what is missing.

    Raises:
        MixtureError: If a source cannot supply its tokens.
        StorageError: If the cache cannot be written.
    """
    planned = {name: share * budget_tokens for name, share in token_shares(mixture).items()}
    sources = open_mixture(
        mixture,
        tokenizer,
        train_tokens={name: math.ceil(tokens) for name, tokens in planned.items()},
        window_tokens=window_tokens,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    return MixtureStats(
        mixture=mixture.name,
        budget_tokens=budget_tokens,
        window_tokens=window_tokens,
        sources={
            name: _source_stats(source, mixture.sources[name].group, planned[name], window_tokens)
            for name, source in sources.items()
        },
    )


def _source_stats(
    source: TokenizedSource, group: str, planned_tokens: float, window_tokens: int
) -> SourceStats:
    shards = [source.train_documents(number) for number in range(source.num_shards)]
    lengths = np.concatenate([documents.lengths for documents in shards])
    num_tokens = int(lengths.sum())
    windows = TrainingStream(source, window_tokens, seed=0).num_windows
    p5, p50, p95 = np.percentile(lengths, [5, 50, 95], method="inverted_cdf").tolist()
    return SourceStats(
        group=group,
        planned_tokens=round(planned_tokens),
        documents=len(lengths),
        tokens=num_tokens,
        held_out_tokens=source.num_held_out_tokens,
        complete=source.cache.complete and source.num_shards == len(source.cache.records),
        tokens_per_document_p5=p5,
        tokens_per_document_p50=p50,
        tokens_per_document_p95=p95,
        windows=windows,
        packing_efficiency=num_tokens / (windows * window_tokens),
        loss_share=sum(map(_tokens_with_loss, shards)) / num_tokens,
        epochs=planned_tokens / (windows * window_tokens),
        left_out=LeftOut.of(source),
    )


def _tokens_with_loss(documents: ShardDocuments) -> int:
    loss = documents.shard.loss
    if loss is None:
        return int(documents.lengths.sum())
    before = np.concatenate([[0], np.cumsum(loss, dtype=np.int64)])
    return int((before[documents.starts + documents.lengths] - before[documents.starts]).sum())


@dataclass(frozen=True)
class Span:
    """A stretch of one document in a window.

    Attributes:
        text: Its tokens, decoded.
        carries_loss: Whether its tokens are targets of the loss.
    """

    text: str
    carries_loss: bool


@dataclass(frozen=True)
class WindowPreview:
    """One training window as a person reads it.

    Attributes:
        source: Name of the source.
        documents: Its documents, or pieces of them, each as spans with and without loss.
        num_tokens: Positions that hold tokens.
        num_empty: Positions that packing left empty.
    """

    source: str
    documents: list[list[Span]]
    num_tokens: int
    num_empty: int


def preview_windows(
    source: TokenizedSource,
    tokenizer: Tokenizer,
    *,
    window_tokens: int,
    num_windows: int,
    seed: int,
) -> Iterator[WindowPreview]:
    """The first training windows of a source."""
    stream = TrainingStream(source, window_tokens, seed)
    for rank in range(min(num_windows, stream.num_windows)):
        window, num_tokens = read_window(stream, rank)
        starts = np.flatnonzero(window.position_ids[:num_tokens] == 0)
        bounds = [*starts.tolist(), num_tokens]
        documents = [_spans(window, tokenizer, start, stop) for start, stop in pairwise(bounds)]
        yield WindowPreview(source.name, documents, num_tokens, window_tokens - num_tokens)


def _spans(window: Window, tokenizer: Tokenizer, start: int, stop: int) -> list[Span]:
    """A document's tokens, grouped by whether they are targets; the first of a document never is."""
    is_target = np.zeros(stop - start, dtype=np.bool_)
    is_target[1:] = window.labels[start : stop - 1] != NO_LOSS
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), stop - start]
    return [
        Span(
            str(tokenizer.decode(window.input_ids[start + first : start + last])),
            bool(is_target[first]),
        )
        for first, last in pairwise(edges)
    ]
