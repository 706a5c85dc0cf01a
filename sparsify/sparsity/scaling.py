"""Scaling law of the share of active neurons over training (Sparsing Law, arXiv 2411.02335).

With A the activation ratio (1 - zeros) and D the training tokens in billions:

    ReLU family:  A(D) = exp(-c·D^α + b) + A0
    SiLU:         A(D) = -c / D^α + A0

Fitted by Levenberg-Marquardt from many starts, as the paper does. Bands follow from the covariance of the coefficients.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeWarning, curve_fit
from scipy.special import stdtrit

from sparsify.models.activations import ACTIVATIONS
from sparsify.runs.history import Trajectory
from sparsify.sparsity.schema import ScalingFit, ScalingPoint

Family = Literal["relu", "silu"]
Array = NDArray[np.float64]

CONFIDENCE = 0.95
BILLION = 1e9
AHEAD = (1.0, 2.0, 5.0, 10.0)
"""Budgets to predict at, as multiples of the tokens seen."""
BAND_POINTS = 40
MAX_BAND_WIDTH = 1.0
"""A fit whose band is wider than the range of ratios is discarded, however well the curve fits the points."""


def family_of(ffn_activation: str) -> Family:
    return "relu" if ACTIVATIONS[ffn_activation].makes_zeros else "silu"


def relu_law(tokens: Array, log_c: float, log_alpha: float, b: float, floor: float) -> Array:
    """exp(-c·D^α + b) + A0. The logarithms keep c and α above 0. `tokens` in units of the last D of the fit."""
    with np.errstate(over="ignore", under="ignore"):
        return np.exp(-np.exp(log_c) * tokens ** np.exp(log_alpha) + b) + floor


def silu_law(tokens: Array, log_c: float, log_alpha: float, ceiling: float) -> Array:
    with np.errstate(over="ignore"):
        return -np.exp(log_c) * tokens ** -np.exp(log_alpha) + ceiling


def fit_scaling(
    tokens: Sequence[int],
    active: Sequence[float],
    family: Family,
) -> ScalingFit | None:
    """Fits the law of a family to the checkpoints of one run.

    Returns:
        The fit; None if there are not more distinct checkpoints than coefficients, if no fit converges, or if the band covers
        every ratio.
    """
    law, num_coefficients = (relu_law, 4) if family == "relu" else (silu_law, 3)
    order = np.argsort(tokens)
    seen = np.asarray(tokens, dtype=float)[order]
    ratios = np.asarray(active, dtype=float)[order]
    if len(set(seen)) <= num_coefficients or seen[0] <= 0 or not np.isfinite(ratios).all():
        return None
    scale = float(seen[-1])
    best = _best_fit(law, seen / scale, ratios, _starts(family, ratios))
    if best is None:
        return None
    coefficients, covariance, residual = best
    budgets = [scale * ahead for ahead in AHEAD]
    line = np.geomspace(seen[0], max(budgets), BAND_POINTS)
    freedom = len(seen) - num_coefficients
    widen = float(stdtrit(freedom, (1 + CONFIDENCE) / 2))

    def points(at: Sequence[float] | Array) -> list[ScalingPoint]:
        middle, deviation = _predict(law, np.asarray(at) / scale, coefficients, covariance)
        return [
            ScalingPoint(tokens=round(d), active=float(a), low=float(a - w), high=float(a + w))
            for d, a, w in zip(at, middle, widen * deviation, strict=True)
        ]

    predicted = points(budgets)
    if max(point.high - point.low for point in predicted) > MAX_BAND_WIDTH:
        return None
    alpha = math.exp(coefficients[1])
    in_billions = (scale / BILLION) ** (-alpha if family == "relu" else alpha)
    return ScalingFit(
        family=family,
        num_points=len(seen),
        alpha=alpha,
        c=math.exp(coefficients[0]) * in_billions,
        b=float(coefficients[2]) if family == "relu" else None,
        limit=float(coefficients[-1]),
        residual=math.sqrt(residual / freedom),
        confidence=CONFIDENCE,
        predicted=predicted,
        band=points(line),
    )


def fit_trajectory(trajectory: Trajectory, ffn_activation: str) -> ScalingFit | None:
    points = [point for point in trajectory.sparse if point.tokens > 0 and point.zeros is not None]
    return fit_scaling(
        [point.tokens for point in points],
        [1 - (point.zeros or 0.0) for point in points],
        family_of(ffn_activation),
    )


def _starts(family: Family, ratios: Array) -> list[tuple[float, ...]]:
    drop = max(float(np.ptp(ratios)), 1e-4)
    low, high = float(ratios.min()), float(ratios.max())
    alphas = np.log([0.1, 0.3, 0.6, 1.0, 1.5, 2.5])
    if family == "silu":
        return [(math.log(c * drop), alpha, high) for alpha in alphas for c in (0.02, 0.1, 0.5)]
    return [
        (math.log(c), alpha, math.log(drop) + shift * c, max(low - part * drop, 0.0))
        for alpha in alphas
        for c in (0.3, 1.0, 3.0, 10.0)
        for shift, part in ((0.0, 0.0), (0.3, 0.3))
    ]


def _best_fit(
    law: Callable[..., Array], tokens: Array, ratios: Array, starts: Sequence[tuple[float, ...]]
) -> tuple[Array, Array, float] | None:
    best: tuple[Array, Array, float] | None = None
    for start in starts:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", (OptimizeWarning, RuntimeWarning))
                found, covariance = curve_fit(
                    law, tokens, ratios, start, method="lm", maxfev=4000, ftol=1e-12, xtol=1e-12
                )
        except (RuntimeError, ValueError):
            continue  # no convergence from this start
        residual = float(((law(tokens, *found) - ratios) ** 2).sum())
        holds = np.isfinite(covariance).all() and 0 <= found[-1] <= 1
        if holds and math.isfinite(residual) and (best is None or residual < best[2]):
            best = found, covariance, residual
    return best


def _predict(law: Callable[..., Array], tokens: Array, coefficients: Array, covariance: Array) -> tuple[Array, Array]:
    middle = law(tokens, *coefficients)
    steps = 1e-5 * np.maximum(np.abs(coefficients), 1e-3)
    columns = []
    for index, step in enumerate(steps):
        shift = np.zeros_like(coefficients)
        shift[index] = step
        up, down = law(tokens, *(coefficients + shift)), law(tokens, *(coefficients - shift))
        columns.append((up - down) / (2 * step))
    slopes = np.stack(columns, axis=-1)
    variance = np.einsum("ni,ij,nj->n", slopes, covariance, slopes)
    return middle, np.sqrt(np.maximum(variance, 0.0))
