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
from sparsify.mixture.sequences.reader import Window

if TYPE_CHECKING:
    from sparsify.evaluation.worker import Answering

METRIC = "token_perplexity"
PREFIX = "held-out/"


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of a mixture, source by source.

    Attributes:
        mixture: Its name.
        windows: The windows.
    """

    mixture: str
    windows: Sequence[Window]

    def by_source(self) -> dict[str, list[Window]]:
        """The windows of each source."""
        groups = groupby(self.windows, key=lambda window: window.source)
        return {source: list(windows) for source, windows in groups}


def fingerprint(windows: Sequence[Window]) -> str:
    """Of the tokens of some windows."""
    digest = xxhash.xxh3_64()
    for window in windows:
        digest.update(window.input_ids.tobytes())
    return digest.hexdigest()


def measure_source(
    workers: Answering, subject: Subject, mixture: str, source: str, windows: Sequence[Window]
) -> tuple[TaskResult, dict[str, dict[str, Score]]]:
    """The row of one source, and its items: a window each.

    Args:
        workers: Who reads the windows.
        subject: The model that they have.
        mixture: Name of the mixture.
        source: Name of the source.
        windows: Its windows.

    Raises:
        EvaluationError: If no window has a token to predict.
    """
    scored: list[tuple[Score, Counts]] = list(
        workers.map("window", [(window,) for window in windows])
    )
    items = {
        f"{source}:{number}:{fingerprint([window])}": {METRIC: score}
        for number, (window, (score, _)) in enumerate(zip(windows, scored, strict=True))
        if score.weight
    }
    if not items:
        raise EvaluationError(
            f"The held-out windows of source {source} have no token to predict.",
            next_step="Raise held_out_windows_per_source in the suite.",
        )
    result = measured("perplexity", [scores[METRIC] for scores in items.values()])
    return TaskResult(
        name=PREFIX + source,
        shots=0,
        data=f"held-out windows of mixture {mixture}",
        version="1",
        metric=METRIC,
        score=result,
        metrics={METRIC: result},
        truncated_requests=0,
        **counted_fields(subject, together(counts for _, counts in scored)),
    ), items
