"""What a model computes while it is asked: zeros and tokens, and what predictors switch on where they mask it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import NamedTuple, Self

import torch

from sparsify.models import SparseModel
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.masking import Mask
from sparsify.predictors.predictors import Predictors
from sparsify.sparsity.probe import SparsityProbe


class Counts(NamedTuple):
    """What was counted over some passes, padding left out."""

    totals: list[int]
    """Values computed, and those of gate, up and product that were not zero."""
    masked: list[int]
    """Neurons that fire, those of them that are switched on, neurons that are on, and values; 0 without predictors."""
    tokens: int
    seconds: float

    @property
    def zero_shares(self) -> tuple[float | None, float | None]:
        """Shares of exact zeros of gate and product; None where nothing was computed."""
        values, gate, _, product = self.totals
        return (1 - gate / values, 1 - product / values) if values else (None, None)

    @property
    def predicted_on(self) -> float | None:
        """Share of the neurons that the predictors switch on; None without predictors."""
        _, _, on, values = self.masked
        return on / values if values else None

    @property
    def predicted_recall(self) -> float | None:
        """Share of the neurons that fire in the masked model which are on; None without predictors."""
        fired, hit, _, _ = self.masked
        return hit / fired if fired else None


def together(counts: Iterable[Counts]) -> Counts:
    """The sum of some counts."""
    sums = Counts([0] * 4, [0] * 4, 0, 0.0)
    for one in counts:
        sums = Counts(
            [a + b for a, b in zip(sums.totals, one.totals, strict=True)],
            [a + b for a, b in zip(sums.masked, one.masked, strict=True)],
            sums.tokens + one.tokens,
            sums.seconds + one.seconds,
        )
    return sums


class Counter:
    """Context manager that counts in every forward pass of a model, with its neurons masked where predictors are given.

    Args:
        model: A sparse model.
        predictors: Of that model; each block then computes only the neurons that they switch on.
    """

    def __init__(self, model: SparseModel, predictors: Predictors | None = None) -> None:
        self._inputs = self._mask = None
        if predictors is not None:
            self._inputs = BlockInputs(model, predictors.facts.input)
            self._mask = Mask(predictors.to(model.device), self._inputs)
        observers = [] if self._mask is None else [self._mask]
        self._probe = SparsityProbe(model, *observers, editor=self._mask)
        self._begun = self._now()

    def __enter__(self) -> Self:
        if self._inputs is not None:
            self._inputs.__enter__()
        self._probe.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._probe.__exit__()
        if self._inputs is not None:
            self._inputs.__exit__()

    def count(self, token_mask: torch.Tensor | None) -> None:
        """Says which tokens of the next forward pass count, bool [batch, tokens]; without a call all of them do."""
        self._probe.count(token_mask)

    def begin(self) -> None:
        """Counting begins anew."""
        self._begun = self._now()

    def taken(self) -> Counts:
        """What was counted since `begin`."""
        begun, now = self._begun, self._now()
        return Counts(
            [a - b for a, b in zip(now.totals, begun.totals, strict=True)],
            [a - b for a, b in zip(now.masked, begun.masked, strict=True)],
            now.tokens - begun.tokens,
            now.seconds - begun.seconds,
        )

    def _now(self) -> Counts:
        masked = torch.zeros(4, dtype=torch.int64)
        if self._mask is not None and self._mask.counts:
            masked = torch.stack(list(self._mask.counts.values())).sum(0)
        totals = self._probe.layer_totals().sum(0).tolist()
        return Counts(totals, masked.tolist(), self._probe.num_tokens, time.perf_counter())
