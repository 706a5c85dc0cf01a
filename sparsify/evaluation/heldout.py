"""Perplexity of each source of a mixture on text that it holds out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import xxhash

from sparsify.errors import EvaluationError
from sparsify.evaluation.model import Counts, Subject, counted_fields, together
from sparsify.evaluation.results import TaskResult
from sparsify.evaluation.scores import Score, measured
from sparsify.mixture.sequences.reader import PackedSequence

if TYPE_CHECKING:
    from sparsify.evaluation.worker import Answering

METRIC = "token_perplexity"
PREFIX = "held-out/"


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences of a mixture, source by source.

    Attributes:
        mixture: Its name.
        sequences: The sequences.
    """

    mixture: str
    sequences: Sequence[PackedSequence]

    def by_source(self) -> dict[str, list[PackedSequence]]:
        """The sequences of each source."""
        groups = groupby(self.sequences, key=lambda sequence: sequence.source)
        return {source: list(sequences) for source, sequences in groups}


def fingerprint(sequences: Sequence[PackedSequence]) -> str:
    """Of the tokens of some sequences."""
    digest = xxhash.xxh3_64()
    for sequence in sequences:
        digest.update(sequence.input_ids.tobytes())
    return digest.hexdigest()


def measure_source(
    workers: Answering,
    subject: Subject,
    mixture: str,
    source: str,
    sequences: Sequence[PackedSequence],
) -> tuple[TaskResult, dict[str, dict[str, Score]]]:
    """The row of one source, and its items: a sequence each.

    Args:
        workers: Who reads the sequences.
        subject: The model that they have.
        mixture: Name of the mixture.
        source: Name of the source.
        sequences: Its sequences.

    Raises:
        EvaluationError: If no sequence has a token to predict.
    """
    scored: list[tuple[Score, Counts]] = list(
        workers.map("sequence", [(sequence,) for sequence in sequences])
    )
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
    result = measured("perplexity", [scores[METRIC] for scores in items.values()])
    return TaskResult(
        name=PREFIX + source,
        shots=0,
        data=f"held-out sequences of mixture {mixture}",
        version="1",
        metric=METRIC,
        score=result,
        metrics={METRIC: result},
        truncated_requests=0,
        **counted_fields(subject, together(counts for _, counts in scored)),
    ), items
