"""A small Bayesian regression of losses on shares, for a handful of trials.

Data-mixing laws say how a domain's loss follows the shares r of a mixture: L_i(r) = c_i + k_i exp(sum_j t_ij r_j)
(J. Ye et al., "Data Mixing Laws", 2024, arXiv 2403.16952, equation 7). With the handful of trials that fit a proxy
budget its exponents cannot be identified, so we do as RegMix does (Q. Liu et al., 2024, arXiv 2407.01492) and fit
what is linear in its coefficients: the shares, which is the law for small exponents, and their logarithms, which bend
as the law does where a domain begins to be learnt. Which of them, and how much they are shrunk (ridge), is chosen by
the leave-one-out error over all outputs, computed in closed form.

All outputs share features and ridge, so that the posterior is a matrix normal: a weighted sum of losses has the same
posterior as if it had been fitted itself, with the correlation of the domains' noise in it. The noise is that of the
leave-one-out errors, not of the residuals: it holds what the features cannot bend to as well, and on data made by the
law above (tests/tuning/test_regression.py) 90% intervals then cover 9 of 10 true values rather than 7 or 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

LOG_FLOOR = 0.03
"""Added to a share before its logarithm: what a domain learns from the other domains' text."""
RIDGES = 10.0 ** np.arange(-4, 3)
"""Times the number of trials, on standardised features; the largest all but says that shares do not matter."""
LEAST_DEGREES = 2.0
"""Degrees of freedom that must be left to the noise."""
FEATURES = {
    "shares": lambda points: points,
    "logarithms of shares": lambda points: np.log(points + LOG_FLOOR),
    "shares and their logarithms": lambda points: np.hstack([points, np.log(points + LOG_FLOOR)]),
}


@dataclass(frozen=True)
class Fit:
    """A fitted regression of D outputs on the shares of P parts, from n trials.

    Args:
        features: A name in FEATURES.
        ridge: Precision of the coefficients' prior over that of the noise.
        centre: Mean of each feature over the trials. [F]
        scale: Standard deviation of each feature over the trials. [F]
        intercept: Mean of each output. [D]
        coefficients: Of the standardised features. [F, D]
        spread: Covariance of the coefficients, in units of the noise's variance. [F, F]
        noise: Covariance of the outputs' errors, judged by the trials that were left out. [D, D]
        degrees: Degrees of freedom that are left to the noise.
        left_out: Prediction of each trial from all the others. [n, D]
    """

    features: str
    ridge: float
    centre: FloatArray
    scale: FloatArray
    intercept: FloatArray
    coefficients: FloatArray
    spread: FloatArray
    noise: FloatArray
    degrees: float
    left_out: FloatArray

    def predict(self, points: FloatArray) -> FloatArray:
        """Expected outputs at points. [m, P] → [m, D]"""
        return self.intercept + self._standardised(points) @ self.coefficients

    def half_width(self, points: FloatArray, weights: FloatArray, level: float) -> FloatArray:
        """Half of the central credible interval of the expected weighted output at points. [m, P], [D] → [m]"""
        z = self._standardised(points)
        leverage = 1 / len(self.left_out) + np.einsum("mf,fg,mg->m", z, self.spread, z)
        return self._half_width(leverage, weights, level)

    def difference_half_width(
        self, points: FloatArray, reference: FloatArray, weights: FloatArray, level: float
    ) -> FloatArray:
        """The same for the paired difference of points to one reference point. [m, P], [P], [D] → [m]"""
        z = self._standardised(points) - self._standardised(reference[None])
        return self._half_width(np.einsum("mf,fg,mg->m", z, self.spread, z), weights, level)

    def _half_width(self, leverage: FloatArray, weights: FloatArray, level: float) -> FloatArray:
        variance = max(float(weights @ self.noise @ weights), 0.0)
        return student_t_limit(self.degrees, level) * np.sqrt(variance * leverage)

    def _standardised(self, points: FloatArray) -> FloatArray:
        return (FEATURES[self.features](points) - self.centre) / self.scale


def fit(points: FloatArray, outputs: FloatArray) -> Fit:
    """Fits every combination of features and ridge, and returns that with the smallest leave-one-out error.

    Args:
        points: Shares of the parts in each trial. [n, P]
        outputs: What was measured in each trial. [n, D]
    """
    variance = _or_one(outputs.var(axis=0))

    def error(candidate: Fit) -> float:
        return float((((candidate.left_out - outputs) ** 2).mean(axis=0) / variance).mean())

    return min(_candidates(points, outputs), key=error)


def left_out_r2(left_out: FloatArray, outputs: FloatArray) -> FloatArray:
    """1 - squared leave-one-out errors over those of the mean of the other trials. 1 is perfect, 0 useless. [D]"""
    num_trials = len(outputs)
    useless = (outputs - outputs.mean(axis=0)) * num_trials / (num_trials - 1)
    errors = ((outputs - left_out) ** 2).sum(axis=0)
    return 1 - errors / _or_one((useless**2).sum(axis=0))


def _candidates(points: FloatArray, outputs: FloatArray) -> Iterator[Fit]:
    intercept = outputs.mean(axis=0)
    for name, features in FEATURES.items():
        raw = features(points)
        centre, scale = raw.mean(axis=0), _or_one(raw.std(axis=0))
        z = (raw - centre) / scale
        for ridge in RIDGES * len(points):
            spread = np.linalg.inv(z.T @ z + ridge * np.eye(z.shape[1]))
            hat = z @ spread @ z.T + 1 / len(points)
            degrees = len(points) - float(np.trace(hat))
            if degrees < LEAST_DEGREES - 1e-6 and ridge < RIDGES[-1] * len(points):
                continue
            coefficients = spread @ z.T @ (outputs - intercept)
            residuals = outputs - intercept - z @ coefficients
            left_out = outputs - residuals / (1 - np.diag(hat))[:, None]
            errors = outputs - left_out
            noise = errors.T @ errors / len(points)
            yield Fit(
                name,
                float(ridge),
                centre,
                scale,
                intercept,
                coefficients,
                spread,
                noise,
                degrees,
                left_out,
            )


def student_t_limit(degrees: float, level: float) -> float:
    """The t with P(|T| <= t) = level: the density integrated numerically, for NumPy has no quantiles of it."""
    angle = np.linspace(0, np.pi / 2, 200_001)[
        :-1
    ]  # t = sqrt(degrees) tan(angle), so the tail is finite
    cumulated = np.cumsum(np.cos(angle) ** (degrees - 1))
    at = int(np.searchsorted(cumulated, level * cumulated[-1]))
    return float(np.sqrt(degrees) * np.tan(angle[at]))


def _or_one(values: FloatArray) -> FloatArray:
    """Nothing that never changed is divided by its spread."""
    return np.where(values > 1e-15, values, 1.0)
