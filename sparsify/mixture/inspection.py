"""Inspects a mixture before training: its sizes, and real sequences as training would draw them.

Also counts what is dropped from a source: bad rows, duplicates, overlaps with evaluation sets.
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
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, read_sequence
from sparsify.mixture.sequences.shares import token_shares
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import BAD_ROWS_FILE, Progress, bad_rows_of, mixture_ingests
from sparsify.mixture.tokens.tokenized_source import ShardDocuments, TokenizedSource
from sparsify.recipe.mixture import MixtureSection

FEW_LABELS = 0.01


class DroppedCounts(BaseModel):
    """Rows and documents that were dropped from the part of a source read so far.

    Attributes:
        bad_rows: Rows that could not be used; None until the source was read as far as a run needed it.
        duplicates: Documents with the same content as an earlier one; None if duplicates are kept.
        contaminated: Documents that overlap with an evaluation item; None without evaluation sets.
    """

    model_config = ConfigDict(frozen=True)

    bad_rows: int | None
    duplicates: int | None
    contaminated: int | None
    notes: list[str]

    @classmethod
    def of(cls, source: TokenizedSource, share: float) -> DroppedCounts:
        """Counts of a source whose `loss_share` is `share`."""
        folder, notes = source.cache.folder, []
        num_read = source.cache.records[-1].read_documents
        bad_rows = bad_rows_of(source)
        if bad_rows is not None and (bad_rows.num_bad_rows or bad_rows.duplicate_files or bad_rows.dropped_turns):
            notes.append(f"{bad_rows.summary()}: {folder / BAD_ROWS_FILE}")
        duplicates = count_duplicates(folder, num_read)
        if duplicates:
            notes.append(f"{source.name}: {duplicates:,} of {num_read:,} documents are duplicates of earlier ones")
        if share < FEW_LABELS:
            notes.append(
                f"{source.name}: only {share:.2%} of the tokens carry loss, so it trains on little or nothing: its answers are "
                "short for their prompts. mixture.instruction_loss=all puts loss on every token"
            )
        report = contamination_report(folder, num_read)
        if report is not None and report.documents_dropped:
            notes.append(
                f"{source.name}: {report.documents_dropped:,} of {num_read:,} documents overlap with "
                f"evaluation items: {folder / REPORT_FILE}"
            )
        return cls(
            bad_rows=bad_rows.num_bad_rows if bad_rows else None,
            duplicates=duplicates,
            contaminated=report.documents_dropped if report else None,
            notes=notes,
        )


class SourceStats(BaseModel):
    """Sizes of one source, as far as a budget reads it. Counts cover training documents unless stated otherwise."""

    group: str
    planned_tokens: int
    """Tokens that the budget draws from the source."""
    documents: int
    tokens: int
    held_out_tokens: int
    complete: bool
    """Whether the counts cover the whole source."""
    tokens_per_document_p5: int
    tokens_per_document_p50: int
    tokens_per_document_p95: int
    sequences: int
    """Sequences of one epoch."""
    packing_efficiency: float
    """Share of sequence positions that carry tokens."""
    loss_share: float
    """Share of tokens that carry loss."""
    epochs: float
    """Number of times the budget sees each document."""
    dropped: DroppedCounts


class MixtureStats(BaseModel):
    mixture: str
    budget_tokens: int
    sequence_length: int
    sources: dict[str, SourceStats]


def open_mixture(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    train_tokens: Mapping[str, int],
    sequence_length: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> dict[str, TokenizedSource]:
    """Tokenises `train_tokens` training tokens of each source, in this process.

    Raises:
        MixtureError: If a source cannot supply its tokens.
        StorageError: If the cache cannot be written.
    """
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens=train_tokens,
        held_out_tokens=sequence_length,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    return {name: ingest.run(on_progress) for name, ingest in ingests.items()}


def measure_mixture(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    budget_tokens: int,
    sequence_length: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> MixtureStats:
    """Measures a mixture as far as a budget reads it. Tokenises what the cache lacks.

    Raises:
        MixtureError: If a source cannot supply its tokens.
        StorageError: If the cache cannot be written.
    """
    planned = {name: share * budget_tokens for name, share in token_shares(mixture).items()}
    sources = open_mixture(
        mixture,
        tokenizer,
        train_tokens={name: math.ceil(tokens) for name, tokens in planned.items()},
        sequence_length=sequence_length,
        cache_dir=cache_dir,
        on_progress=on_progress,
    )
    return MixtureStats(
        mixture=mixture.name,
        budget_tokens=budget_tokens,
        sequence_length=sequence_length,
        sources={
            name: _source_stats(source, mixture.sources[name].group, planned[name], sequence_length)
            for name, source in sources.items()
        },
    )


def _source_stats(source: TokenizedSource, group: str, planned_tokens: float, sequence_length: int) -> SourceStats:
    shards = [source.train_documents(number) for number in range(source.num_shards)]
    lengths = np.concatenate([documents.lengths for documents in shards])
    num_tokens = int(lengths.sum())
    sequences = TrainingStream(source, sequence_length, seed=0).num_sequences
    share = loss_share(source)
    p5, p50, p95 = np.percentile(lengths, [5, 50, 95], method="inverted_cdf").tolist()
    return SourceStats(
        group=group,
        planned_tokens=round(planned_tokens),
        documents=len(lengths),
        tokens=num_tokens,
        held_out_tokens=source.num_held_out_tokens,
        complete=source.cache.complete and num_tokens == sum(record.train_tokens for record in source.cache.records),
        tokens_per_document_p5=p5,
        tokens_per_document_p50=p50,
        tokens_per_document_p95=p95,
        sequences=sequences,
        packing_efficiency=num_tokens / (sequences * sequence_length),
        loss_share=share,
        epochs=planned_tokens / (sequences * sequence_length),
        dropped=DroppedCounts.of(source, share),
    )


def loss_share(source: TokenizedSource) -> float:
    """Share of the training tokens that carry loss."""
    shards = [source.train_documents(number) for number in range(source.num_shards)]
    return sum(map(_tokens_with_loss, shards)) / max(1, sum(int(one.lengths.sum()) for one in shards))


def _tokens_with_loss(documents: ShardDocuments) -> int:
    loss = documents.shard.loss
    if loss is None:
        return int(documents.lengths.sum())
    before = np.concatenate([[0], np.cumsum(loss, dtype=np.int64)])
    return int((before[documents.starts + documents.lengths] - before[documents.starts]).sum())


@dataclass(frozen=True)
class PreviewSpan:
    """Consecutive tokens of one document in a sequence."""

    text: str
    carries_loss: bool


@dataclass(frozen=True)
class SequencePreview:
    """One training sequence as text.

    Attributes:
        documents: The documents, or pieces of documents, each as spans with and without loss.
        num_empty: Positions that packing left empty.
    """

    source: str
    documents: list[list[PreviewSpan]]
    num_tokens: int
    num_empty: int


def preview_sequences(
    source: TokenizedSource,
    tokenizer: Tokenizer,
    *,
    sequence_length: int,
    num_sequences: int,
    seed: int,
) -> Iterator[SequencePreview]:
    stream = TrainingStream(source, sequence_length, seed)
    for rank in range(min(num_sequences, stream.num_sequences)):
        sequence, num_tokens = read_sequence(stream, rank)
        starts = np.flatnonzero(sequence.position_ids[:num_tokens] == 0)
        bounds = [*starts.tolist(), num_tokens]
        documents = [_spans(sequence, tokenizer, start, stop) for start, stop in pairwise(bounds)]
        yield SequencePreview(source.name, documents, num_tokens, sequence_length - num_tokens)


def _spans(sequence: PackedSequence, tokenizer: Tokenizer, start: int, stop: int) -> list[PreviewSpan]:
    # The first token of a document is never a target.
    is_target = np.zeros(stop - start, dtype=np.bool_)
    is_target[1:] = sequence.labels[start : stop - 1] != NO_LOSS
    edges = [0, *(np.flatnonzero(np.diff(is_target)) + 1).tolist(), stop - start]
    return [
        PreviewSpan(
            str(tokenizer.decode(sequence.input_ids[start + first : start + last])),
            bool(is_target[first]),
        )
        for first, last in pairwise(edges)
    ]
