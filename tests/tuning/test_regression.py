"""Regression and choice on synthetic losses that follow the data-mixing law."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from sparsify.errors import RecipeError
from sparsify.tuning.decision import LEVEL, MixtureChoice, choose, objective_weights
from sparsify.tuning.regression import fit, loo_r2, student_t_limit
from sparsify.tuning.space import Part, Space

Array = NDArray[np.float64]


def law(rng: np.random.Generator, parts: int, effect: float) -> Callable[[Array], Array]:
    """Ye et al. 2024: losses that decrease with a domain's own share, fastest at small shares."""
    floor, height = rng.uniform(1, 3, parts), rng.uniform(0.5, 1, parts) * effect
    exponents = rng.uniform(0, 0.5, (parts, parts))
    np.fill_diagonal(exponents, rng.uniform(-4, -1, parts))
    return lambda points: floor + height * np.exp(points @ exponents.T)


def simplex(default: Array) -> Space:
    names = [f"s{i}" for i in range(len(default))]
    return Space(tuple(Part(name, 0, 1, {name: 1.0}) for name in names), default)


def trials(
    space: Space, truth: Callable[[Array], Array], num_trials: int, noise: float, seed: int
) -> tuple[Array, Array]:
    points = np.vstack([space.default, space.spread(num_trials - 1, seed)])
    losses = truth(points)
    return points, losses + noise * np.random.default_rng(seed).standard_normal(losses.shape)


def test_it_finds_a_better_mixture_where_there_is_one() -> None:
    """The default gives the domain of largest weight too few tokens; choices realise most of the possible gain."""
    gained, there_was = 0.0, 0.0
    weights = np.array([0.7, 0.2, 0.1])
    for seed in range(20):
        truth = law(np.random.default_rng(seed), 3, 0.5)
        space = simplex(np.array([0.05, 0.15, 0.8]))
        points, losses = trials(space, truth, 10, 0.003, seed)
        choice = choose(space, fit(points, losses), losses, weights)
        assert choice.reason is None
        reached, default = truth(choice.point[None])[0], truth(space.default[None])[0]
        assert reached @ weights < default @ weights
        gained += (default - reached) @ weights
        there_was += ((default - truth(space.spread(2048, 9))) @ weights).max()
    assert gained > 0.85 * there_was


def test_intervals_of_the_difference_cover_the_truth() -> None:
    covered = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        default, weights = rng.dirichlet([3, 3, 3]), rng.dirichlet([3, 3, 3])
        truth, space = law(rng, 3, 0.3), simplex(default)
        points, losses = trials(space, truth, 8, 0.01, seed)
        fitted, candidates = fit(points, losses), space.spread(256, 99)
        gap = (fitted.predict(candidates) - fitted.predict(default[None])) @ weights
        true_gap = (truth(candidates) - truth(default[None])) @ weights
        half = fitted.difference_half_width(candidates, default, weights, LEVEL)
        covered.append(np.mean(np.abs(gap - true_gap) <= half))
    assert 0.85 < np.mean(covered) < 0.99


def test_noise_alone_does_not_support_a_choice() -> None:
    supported = 0
    for seed in range(30):
        space = simplex(np.array([0.2, 0.3, 0.5]))
        points, losses = trials(space, lambda p: np.ones((len(p), 3)), 8, 0.02, seed)
        choice = choose(space, fit(points, losses), losses, np.full(3, 1 / 3))
        supported += choice.reason is None
    assert supported <= 3


def test_a_choice_is_within_the_bounds() -> None:
    parts = (Part("a", 0.1, 0.4, {"a": 1.0}), Part("b", 0.6, 0.9, {"b": 1.0}))
    space = Space(parts, np.array([0.1, 0.9]))
    points, losses = trials(space, lambda p: 3 - p, 6, 0.001, 0)
    choice = choose(space, fit(points, losses), losses, np.array([1.0, 0.0]))
    assert choice.reason is None
    assert choice.point.tolist() == pytest.approx([0.4, 0.6], abs=1e-3)
    assert choice.difference == pytest.approx(-0.3, abs=0.01)


def test_leave_one_out_equals_an_explicit_refit() -> None:
    """Compares the closed form with explicit refits; features keep the scale of all trials, as in the closed form."""
    space = simplex(np.array([0.3, 0.7]))
    points, losses = trials(space, lambda p: np.sqrt(p), 7, 0.02, 4)
    fitted = fit(points, losses)
    z = fitted._standardised(points)
    for index in range(7):
        kept = np.arange(7) != index
        centre, mean = z[kept].mean(axis=0), losses[kept].mean(axis=0)
        inner = z[kept] - centre
        inverse = np.linalg.inv(inner.T @ inner + fitted.ridge * np.eye(z.shape[1]))
        predicted = mean + (z[index] - centre) @ inverse @ inner.T @ (losses[kept] - mean)
        assert fitted.loo[index] == pytest.approx(predicted, abs=1e-9)


def test_r2_distinguishes_a_perfect_fit_from_a_useless_one() -> None:
    observed = np.array([[1.0], [2.0], [4.0]])
    assert loo_r2(observed, observed) == pytest.approx(1)
    others = (observed.sum() - observed) / 2
    assert loo_r2(others, observed) == pytest.approx(0)


@pytest.mark.parametrize(("degrees", "level", "limit"), [(1, 0.9, 6.3138), (3, 0.95, 3.1824), (30, 0.9, 1.6973)])
def test_student_t_limits_match_the_tables(degrees: float, level: float, limit: float) -> None:
    assert student_t_limit(degrees, level) == pytest.approx(limit, rel=1e-3)


def test_a_choice_says_why_it_is_not_supported() -> None:
    point = np.array([1.0])
    assert "contains 0" in str(MixtureChoice(point, -0.01, 0.02, 0.001).reason)
    assert "is not smaller than the improvement" in str(MixtureChoice(point, -0.03, 0.02, 0.04).reason)
    assert MixtureChoice(point, -0.03, 0.02, 0.01).reason is None


def test_weights_are_shares_times_factors() -> None:
    shares = {"web": 0.5, "code": 0.25, "books": 0.25}
    assert objective_weights(list(shares), shares, []) == shares
    weights = objective_weights(list(shares), shares, ["code=3", "books=0"])
    assert weights == pytest.approx({"web": 0.4, "code": 0.6, "books": 0.0})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["cod=2"], "Did you mean 'code'"),
        (["code"], "doubles the weight of code"),
        (["code=-1"], "factor of 0 or more"),
        (["code=nan"], "factor of 0 or more"),
        (["math=2"], "has share 0"),
        (["code=0", "web=0"], "gives all domains weight 0"),
    ],
)
def test_invalid_weights_are_refused(given: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        objective_weights(["web", "code", "math"], {"web": 0.5, "code": 0.5}, given)
    assert message in str(error.value)
