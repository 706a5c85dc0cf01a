"""Metrics with confidence intervals, computed from the scores of single items.

Every metric is a ratio of two sums over items: of scores and of weights (1 for accuracy, words for a perplexity per word).
Its standard error is that of a ratio estimate (W. Cochran, Sampling Techniques, 6.3), from the spread between items: it
tells how much the metric would vary with other items of the same kind. The difference of two models is paired: it is
computed on the same items, so that an item's difficulty cancels out.
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
    value: float
    """The item's score for a mean; its negative log-likelihood in nats for a perplexity."""
    weight: float


class MetricValue(BaseModel):
    kind: Kind
    value: float
    low: float | None
    high: float | None
    """Bounds of the 95% interval; None for a single item."""
    items: int


class Difference(BaseModel):
    """The paired difference of a metric between two models on the same items."""

    kind: Kind
    value: float
    """First minus second; for a perplexity, of its logarithm in nats."""
    low: float | None
    high: float | None
    items: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains 0 or is unknown."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    @property
    def better(self) -> bool:
        """Whether the first model is better beyond the noise."""
        return not self.within_noise and (self.value > 0) == (self.kind == "mean")


def kind_of(metric: str) -> Kind:
    return "perplexity" if metric.partition(",")[0] in PERPLEXITIES else "mean"


def metric_value(kind: Kind, scores: Sequence[Score]) -> MetricValue:
    """The value of a metric over some items, with its 95% interval."""
    ratio, residuals = _ratio(scores)
    error = _standard_error(residuals)
    low, high = _interval(ratio, error)
    if kind == "mean":
        return MetricValue(kind=kind, value=ratio, low=low, high=high, items=len(scores))
    bounds = [None if bound is None else _exp(bound) for bound in (low, high)]
    return MetricValue(kind=kind, value=_exp(ratio), low=bounds[0], high=bounds[1], items=len(scores))


def difference(kind: Kind, first: Mapping[str, Score], second: Mapping[str, Score]) -> Difference | None:
    """The paired difference of two models on the items that both have; None if they share none."""
    both = sorted(first.keys() & second.keys())
    if not both:
        return None
    ratio, residuals = _ratio([first[item] for item in both])
    other, others = _ratio([second[item] for item in both])
    low, high = _interval(ratio - other, _standard_error(residuals - others))
    return Difference(kind=kind, value=ratio - other, low=low, high=high, items=len(both))


def mean_of(parts: Sequence[MetricValue]) -> MetricValue:
    """Unweighted mean of several tasks' scores."""
    errors = [None if part.low is None or part.high is None else (part.high - part.low) / (2 * Z_95) for part in parts]
    value = sum(part.value for part in parts) / len(parts)
    known = [error for error in errors if error is not None]
    error = math.hypot(*known) / len(parts) if len(known) == len(parts) else None
    low, high = _interval(value, error)
    return MetricValue(kind="mean", value=value, low=low, high=high, items=sum(one.items for one in parts))


def scores_of(metric: str, value: Any) -> Score | None:
    """Converts the value that lm-evaluation-harness recorded for an item; None if it is not a number."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return Score(-float(value[0]), float(value[1]))
    if not isinstance(value, bool | int | float | np.number):
        return None
    return Score(-float(value) if kind_of(metric) == "perplexity" else float(value), 1.0)


def _ratio(scores: Sequence[Score]) -> tuple[float, np.ndarray]:
    """The ratio of the sums, and the linearised influence of each item on it."""
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
