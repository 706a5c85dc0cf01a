"""From the score of each item to a number with its interval.

Every metric is a ratio of two sums over items: of scores and of weights (1 for accuracy, words for a perplexity per word).
Its standard error is that of the ratio (W. Cochran, Sampling Techniques, 6.3), from the spread between items: it says how
much the number would move if other items of the same kind had been asked. Between two models the same items are compared, so
what makes an item hard for both does not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel

Kind = Literal["mean", "perplexity"]
Z_95 = 1.959964
"""Two-sided 95% of a normal distribution."""
PERPLEXITIES = ("perplexity", "word_perplexity", "byte_perplexity", "token_perplexity")


class Score(NamedTuple):
    """What one item adds to a metric."""

    value: float
    """Of a mean, the item's score; of a perplexity, its negative log-likelihood in nats."""
    weight: float


class Measured(BaseModel):
    """One metric of one task."""

    kind: Kind
    value: float
    low: float | None
    high: float | None
    """95% interval; None for a single item."""
    items: int


class Difference(BaseModel):
    """One metric of two models on the same items."""

    kind: Kind
    value: float
    """Of a mean, the first minus the second; of a perplexity, the difference of its logarithm, in nats."""
    low: float | None
    high: float | None
    items: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval holds 0, or is not known."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    @property
    def better(self) -> bool:
        """Whether the first model is better beyond the noise."""
        return not self.within_noise and (self.value > 0) == (self.kind == "mean")


def kind_of(metric: str) -> Kind:
    """How the scores of a metric come together."""
    return "perplexity" if metric.partition(",")[0] in PERPLEXITIES else "mean"


def measured(kind: Kind, scores: Sequence[Score]) -> Measured:
    """The metric of some items.

    Raises:
        ValueError: If there is none.
    """
    ratio, residuals = _ratio(scores)
    error = _standard_error(residuals)
    low, high = _interval(ratio, error)
    if kind == "mean":
        return Measured(kind=kind, value=ratio, low=low, high=high, items=len(scores))
    bounds = [None if bound is None else _exp(bound) for bound in (low, high)]
    return Measured(kind=kind, value=_exp(ratio), low=bounds[0], high=bounds[1], items=len(scores))


def difference(
    kind: Kind, first: Mapping[str, Score], second: Mapping[str, Score]
) -> Difference | None:
    """The paired difference of two models on the items that both were asked; None if there is none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    ratio, residuals = _ratio([first[item] for item in both])
    other, others = _ratio([second[item] for item in both])
    low, high = _interval(ratio - other, _standard_error(residuals - others))
    return Difference(kind=kind, value=ratio - other, low=low, high=high, items=len(both))


def mean_of(parts: Sequence[Measured]) -> Measured:
    """Mean of several tasks' scores, each counting the same."""
    errors = [
        None if part.low is None or part.high is None else (part.high - part.low) / (2 * Z_95)
        for part in parts
    ]
    value = sum(part.value for part in parts) / len(parts)
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(parts) if len(known) == len(parts) else None
    low, high = _interval(value, error)
    return Measured(
        kind="mean", value=value, low=low, high=high, items=sum(one.items for one in parts)
    )


def scores_of(metric: str, value: Any) -> Score | None:
    """What lm-evaluation-harness recorded for an item, as a score; None where it is no number."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return Score(-float(value[0]), float(value[1]))
    if not isinstance(value, bool | int | float | np.number):
        return None
    return Score(-float(value) if kind_of(metric) == "perplexity" else float(value), 1.0)


def _ratio(scores: Sequence[Score]) -> tuple[float, np.ndarray]:
    """The ratio of the sums, and what each item moves it by (linearised)."""
    if not scores:
        raise ValueError("no items")
    values, weights = np.array(scores, dtype=np.float64).T
    ratio = values.sum() / weights.sum()
    return float(ratio), (values - ratio * weights) / weights.mean()


def _standard_error(residuals: np.ndarray) -> float | None:
    return float(residuals.std(ddof=1) / math.sqrt(len(residuals))) if len(residuals) > 1 else None


def _interval(value: float, error: float | None) -> tuple[float | None, float | None]:
    return (None, None) if error is None else (value - Z_95 * error, value + Z_95 * error)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
