"""Fits to synthetic data with the published coefficients of Sparsing Law."""

from __future__ import annotations

import numpy as np
import pytest

from sparsify.sparsity.scaling import family_of, fit_scaling

# Size: α, b, c, A0 with D in billions of tokens (arXiv 2411.02335).
RELU = {
    "0.1B": (0.101, -0.0151, 3.20, 0.0614),
    "0.2B": (0.449, -3.05, 0.286, 0.0674),
    "0.4B": (0.683, -3.46, 0.0790, 0.0690),
    "0.8B": (1.01, -3.49, 7.97e-3, 0.0721),
    "1.2B": (1.33, -3.89, 9.03e-4, 0.0782),
    "2.4B": (1.53, -3.46, 1.56e-4, 0.0648),
}
SILU = {
    "0.1B": (0.479, 0.102, 0.409),
    "0.2B": (0.844, 0.208, 0.390),
    "0.4B": (1.03, 0.420, 0.385),
    "0.8B": (0.995, 0.562, 0.383),
    "1.2B": (0.967, 0.538, 0.382),
}
BILLIONS = np.geomspace(1, 800, 60)
TOKENS = [round(billions * 1e9) for billions in BILLIONS]


@pytest.mark.parametrize("size", RELU)
def test_recovers_the_relu_coefficients(size: str) -> None:
    alpha, b, c, limit = RELU[size]
    active = np.exp(-c * BILLIONS**alpha + b) + limit
    fit = fit_scaling(TOKENS, list(active), "relu")
    assert fit is not None
    assert fit.b is not None
    assert (fit.alpha, fit.b, fit.c, fit.limit) == pytest.approx((alpha, b, c, limit), rel=0.01)


@pytest.mark.parametrize("size", SILU)
def test_recovers_the_silu_coefficients(size: str) -> None:
    alpha, c, limit = SILU[size]
    fit = fit_scaling(TOKENS, list(-c / BILLIONS**alpha + limit), "silu")
    assert fit is not None
    assert (fit.alpha, fit.c, fit.limit) == pytest.approx((alpha, c, limit), rel=0.01)


def test_bands_have_their_nominal_coverage() -> None:
    alpha, c, limit = SILU["0.4B"]
    truth = -c / BILLIONS**alpha + limit
    ahead = -c / 1600**alpha + limit
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        fit = fit_scaling(TOKENS, list(truth + rng.normal(0, 1e-3, 60)), "silu")
        assert fit is not None
        doubled = fit.predicted[1]
        assert doubled.tokens == 1600 * 10**9
        held += doubled.low <= ahead <= doubled.high
    assert held >= 51  # 95% of 60 is 57; below 51 happens less than once in a hundred times


def test_noise_widens_the_band() -> None:
    alpha, b, c, limit = RELU["0.8B"]
    active = np.exp(-c * BILLIONS**alpha + b) + limit
    noise = np.random.default_rng(0).normal(0, 1, 60)
    small, large = (fit_scaling(TOKENS, list(active + s * noise), "relu") for s in (1e-5, 1e-3))
    assert small is not None
    assert large is not None
    widths = [fit.band[-1].high - fit.band[-1].low for fit in (small, large)]
    assert widths[0] < widths[1]
    assert small.residual == pytest.approx(1e-5, rel=0.3)


def test_too_few_checkpoints_give_no_fit() -> None:
    assert fit_scaling([1, 2, 3, 4], [0.4, 0.3, 0.25, 0.22], "relu") is None
    assert fit_scaling([1, 2, 3], [0.2, 0.3, 0.35], "silu") is None
    assert fit_scaling([5] * 9, [0.3] * 9, "relu") is None


def test_checkpoints_that_do_not_determine_a_law_give_no_fit() -> None:
    # Validations of a short run: the zeros have converged, and five points scatter around their mean.
    tokens = [40_960 * step for step in range(1, 6)]
    assert fit_scaling(tokens, [0.13114, 0.12951, 0.13004, 0.1297, 0.12976], "relu") is None


def test_families() -> None:
    assert [family_of(name) for name in ("swiglu", "reglu", "drelu")] == ["silu", "relu", "relu"]
