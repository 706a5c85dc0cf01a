"""Perplexity of each source of a mixture on text that it holds out of training."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import xxhash

from sparsify.errors import EvaluationError
from sparsify.evaluation.model import active_count, zero_shares
from sparsify.evaluation.results import TaskResult
from sparsify.evaluation.scores import Score, measured
from sparsify.mixture.windows import Window, collate
from sparsify.models import SparseModel
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss
from sparsify.sparsity.probe import SparsityProbe

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
    model: SparseModel, mixture: str, source: str, windows: Sequence[Window], probe: SparsityProbe
) -> tuple[TaskResult, dict[str, dict[str, Score]]]:
    """The row of one source, and its items: a window each.

    Raises:
        EvaluationError: If no window has a token to predict.
    """
    before, tokens = probe.layer_totals().sum(0), probe.num_tokens
    started = time.perf_counter()
    scored = [(window, _score(model, window)) for window in windows]
    items = {
        f"{source}:{number}:{fingerprint([window])}": {METRIC: score}
        for number, (window, score) in enumerate(scored)
        if score.weight
    }
    if not items:
        raise EvaluationError(
            f"The held-out windows of source {source} have no token to predict.",
            next_step="Raise held_out_windows_per_source in the suite.",
        )
    totals = probe.layer_totals().sum(0) - before
    gate_zeros, product_zeros = zero_shares(totals)
    result = measured("perplexity", [scores[METRIC] for scores in items.values()])
    return TaskResult(
        name=PREFIX + source,
        shots=0,
        data=f"held-out windows of mixture {mixture}",
        version="1",
        metric=METRIC,
        score=result,
        metrics={METRIC: result},
        gate_zeros=gate_zeros,
        product_zeros=product_zeros,
        tokens=probe.num_tokens - tokens,
        active_parameters=active_count(model, totals),
        truncated_requests=0,
        seconds=round(time.perf_counter() - started, 3),
    ), items


def _score(model: SparseModel, window: Window) -> Score:
    batch = {key: value.to(model.device) for key, value in collate([window]).items()}
    return Score(float(summed_loss(model, batch)), float((batch["labels"] != IGNORED_LABEL).sum()))
