"""Perplexity of each source of a mixture on its held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import xxhash

from sparsify.errors import EvaluationError
from sparsify.evaluation.metrics import Score, metric_value
from sparsify.evaluation.results import TaskResult
from sparsify.evaluation.subject import Counts, Subject, counted_fields, sum_counts
from sparsify.mixture.sequences.reader import PackedSequence

if TYPE_CHECKING:
    from sparsify.evaluation.worker_pool import WorkerPool

METRIC = "token_perplexity"
PREFIX = "held-out/"


@dataclass(frozen=True)
class HeldOut:
    mixture: str
    sequences: Sequence[PackedSequence]

    def by_source(self) -> dict[str, list[PackedSequence]]:
        groups = groupby(self.sequences, key=lambda sequence: sequence.source)
        return {source: list(sequences) for source, sequences in groups}


def fingerprint(sequences: Sequence[PackedSequence]) -> str:
    """xxh3-64 of the tokens of some sequences."""
    digest = xxhash.xxh3_64()
    for sequence in sequences:
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


def measure_source(
    workers: WorkerPool,
    subject: Subject,
    mixture: str,
    source: str,
    sequences: Sequence[PackedSequence],
) -> tuple[TaskResult, dict[str, dict[str, Score]]]:
    """The result of one source, and its items: one per sequence.

    Raises:
        EvaluationError: If no sequence has a token to predict.
    """
    scored: list[tuple[Score, Counts]] = list(workers.map("sequence", [(sequence,) for sequence in sequences]))
    items = {
        f"{source}:{number}:{fingerprint([sequence])}": {METRIC: score}
        for number, (sequence, (score, _)) in enumerate(zip(sequences, scored, strict=True))
        if score.weight
    }
    if not items:
        raise EvaluationError(
            f"The held-out sequences of source {source} have no token to predict.",
            next_step="Raise held_out_sequences_per_source in the suite.",
        )
    result = metric_value("perplexity", [scores[METRIC] for scores in items.values()])
    return TaskResult(
        name=PREFIX + source,
        shots=0,
        data=f"held-out sequences of mixture {mixture}",
        version="1",
        metric=METRIC,
        score=result,
        metrics={METRIC: result},
        truncated_requests=0,
        **counted_fields(subject, sum_counts(counts for _, counts in scored)),
    ), items
