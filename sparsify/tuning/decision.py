"""Decides which mixture the regression predicts to be better, by how much, and whether the data support it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import RecipeError, nearest
from sparsify.tuning.record import WEIGHTED, Domain, Quality, ShareCurve, TrialRecord, TuneRecord
from sparsify.tuning.regression import Fit, fit, loo_r2
from sparsify.tuning.space import Space
from sparsify.tuning.trials import Measurement, Proxy

FloatArray = NDArray[np.float64]

LEVEL = 0.9
"""Credible level of all reported intervals."""
NUM_CANDIDATES = 4096
REFINEMENTS = 12
CANDIDATES_SEED = 0


@dataclass(frozen=True)
class MixtureChoice:
    """A mixture compared with the default, in nats per token of the weighted loss. Negative is better.

    Args:
        point: Shares of the parts. [P]
        difference: Expected loss minus that of the default.
        half_width: Half width of the difference's interval at LEVEL.
        loo_error: Root mean square of the leave-one-out errors of the weighted loss.
    """

    point: FloatArray
    difference: float
    half_width: float
    loo_error: float

    @property
    def reason(self) -> str | None:
        if self.difference + self.half_width >= 0:
            return (
                f"the {LEVEL:.0%} interval of its difference to the default, "
                f"{self.difference - self.half_width:+.4f} to {self.difference + self.half_width:+.4f}, contains 0"
            )
        if self.loo_error >= -self.difference:
            return (
                f"the leave-one-out error of the regression, {self.loo_error:.4f}, "
                f"is not smaller than the improvement of {-self.difference:.4f}"
            )
        return None


def objective_weights(
    domains: Sequence[str], default_shares: Mapping[str, float], given: Sequence[str]
) -> dict[str, float]:
    """Weight of each domain's loss in the objective, which is minimised: the default shares times the given
    `DOMAIN=FACTOR`; they sum to 1. Raises RecipeError if a domain is unknown, a factor is not a number, or all weights
    are 0.
    """
    factors: dict[str, float] = {}
    for item in given:
        name, _, text = item.partition("=")
        if name not in domains:
            raise RecipeError(
                f"--weight names {name!r}, which is not a source of the mixture.",
                allowed=f"{nearest(name, domains)}Sources: {', '.join(domains)}.",
            )
        factors[name] = _factor(item, text)
        if not default_shares.get(name):
            raise RecipeError(
                f"--weight {item}: {name} has share 0 in the recipe's mixture, so there is nothing to multiply.",
                allowed="The weight of a domain is FACTOR times its share in the recipe's mixture.",
                next_step=f"Give {name} a small token_share in the mixture first.",
            )
    weights = {name: default_shares.get(name, 0.0) * factors.get(name, 1.0) for name in domains}
    total = sum(weights.values())
    if not total:
        raise RecipeError(
            f"--weight {' '.join(given)} gives all domains weight 0.",
            next_step="Give at least one domain a factor above 0.",
        )
    return {name: weight / total for name, weight in weights.items()}


def _factor(item: str, text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = -1.0
    if not (0 <= factor < np.inf):
        raise RecipeError(
            f"--weight {item!r} has no valid factor.",
            allowed="DOMAIN=FACTOR with a factor of 0 or more; e.g. --weight code=2 doubles the weight of code.",
        )
    return factor


def choose(space: Space, fitted: Fit, outputs: FloatArray, weights: FloatArray) -> MixtureChoice:
    """The mixture with the most certain improvement over the default.

    It minimises the upper end of the paired interval, so that a mixture far from all trials is not preferred because of
    an uncertain prediction. If no interval is entirely below 0, it minimises the expected loss, and
    `MixtureChoice.reason` says that the choice is not supported.

    Args:
        space: The mixtures to choose from.
        fitted: The regression.
        outputs: Measured outputs of the n trials. [n, D]
        weights: Weight of each output in the weighted loss. [D]
    """
    error = float(np.sqrt((((fitted.loo - outputs) @ weights) ** 2).mean()))

    def difference(points: FloatArray) -> FloatArray:
        return (fitted.predict(points) - fitted.predict(space.default[None])) @ weights

    def half_width(points: FloatArray) -> FloatArray:
        return fitted.difference_half_width(points, space.default, weights, LEVEL)

    def upper(points: FloatArray) -> FloatArray:
        return difference(points) + half_width(points)

    candidates = space.spread(NUM_CANDIDATES, CANDIDATES_SEED)
    for objective in (upper, difference):
        point = candidates[int(np.argmin(objective(candidates)))]
        for refinement in range(REFINEMENTS):
            # The space is convex, so a step from the best point towards any other point stays inside.
            near = point + (candidates - point) * 0.6**refinement
            near = np.vstack([point, near])
            point = near[int(np.argmin(objective(near)))]
        point = space.point_of(space.source_shares(point))  # rounded as in the mixture file
        chosen = MixtureChoice(point, float(difference(point[None])[0]), float(half_width(point[None])[0]), error)
        if chosen.difference + chosen.half_width < 0:
            break
    return chosen


CURVE_POINTS = 61
NEAR_BOUND = 2e-3


def conclude(space: Space, weights: Mapping[str, float], measured: Sequence[tuple[Proxy, Measurement]]) -> TuneRecord:
    """Fits the regression to the trials, of which the first is the default mixture, and chooses a mixture."""
    delivered = [proxy.delivered_shares for proxy, _ in measured]
    points = np.array([space.point_of(shares) for shares in delivered])
    outputs = np.array([[*(one.losses[name] for name in weights), one.zeros] for _, one in measured])
    objective = np.array([*weights.values(), 0.0])
    fitted = fit(points, outputs)
    choice = choose(space, fitted, outputs, objective)
    default, tuned = space.source_shares(space.default), space.source_shares(choice.point)
    before, after = fitted.predict(np.array([space.default, choice.point]))
    quality = [_quality(fitted, outputs, unit) for unit in np.eye(len(objective))]
    domains = {
        name: Domain(
            weight=weight,
            default_share=default.get(name, 0.0),
            tuned_share=tuned.get(name, 0.0),
            default_loss=float(before[index]),
            tuned_loss=float(after[index]),
            loo_error=quality[index].loo_error,
            loo_r2=quality[index].loo_r2,
        )
        for index, (name, weight) in enumerate(weights.items())
    }
    return TuneRecord(
        parts=[part.name for part in space.parts],
        default_part_shares=space.default.tolist(),
        tuned_part_shares=choice.point.tolist(),
        trials=_trials(measured, delivered, points, outputs, fitted, objective),
        domains=domains,
        weighted=_quality(fitted, outputs, objective),
        zeros=quality[-1],
        default_zeros=float(before[-1]),
        tuned_zeros=float(after[-1]),
        default_loss=float(before @ objective),
        tuned_loss=float(after @ objective),
        half_width=choice.half_width,
        features=fitted.features,
        ridge=fitted.ridge,
        reason=choice.reason,
        at_bounds=_at_bounds(space, choice.point),
        curves=_curves(space, list(weights), points, outputs, fitted, objective, choice.point),
    )


def _at_bounds(space: Space, point: FloatArray) -> list[str]:
    """Bounds of --over on which the choice lies; 0 and 1 are not reported."""
    found = []
    pairs = list(zip(space.parts, point, strict=True))
    for part, share in pairs[:1] if len(pairs) == 2 else pairs:
        for side, bound, open_end in (("lower", part.low, 0.0), ("upper", part.high, 1.0)):
            if abs(share - bound) < NEAR_BOUND and abs(bound - open_end) > NEAR_BOUND:
                found.append(f"{part.name} is at its {side} bound, {bound:.1%}")
    return found


def _trials(
    measured: Sequence[tuple[Proxy, Measurement]],
    delivered: Sequence[dict[str, float]],
    points: FloatArray,
    outputs: FloatArray,
    fitted: Fit,
    objective: FloatArray,
) -> list[TrialRecord]:
    rows = zip(measured, delivered, points, outputs, fitted.loo, strict=True)
    return [
        TrialRecord(
            folder=str(proxy.run.path),
            shares=shares,
            part_shares=point.tolist(),
            losses=one.losses,
            loo_losses=dict(zip(one.losses, loo.tolist(), strict=False)),
            weighted_loss=float(output @ objective),
            loo_weighted_loss=float(loo @ objective),
            zeros=one.zeros,
            loo_zeros=float(loo[-1]),
        )
        for (proxy, one), shares, point, output, loo in rows
    ]


def _quality(fitted: Fit, outputs: FloatArray, weights: FloatArray) -> Quality:
    observed, loo = outputs @ weights, fitted.loo @ weights
    return Quality(
        loo_error=float(np.sqrt(((observed - loo) ** 2).mean())),
        loo_r2=float(loo_r2(loo[:, None], observed[:, None])[0]),
    )


def _curves(
    space: Space,
    domains: Sequence[str],
    points: FloatArray,
    outputs: FloatArray,
    fitted: Fit,
    objective: FloatArray,
    tuned: FloatArray,
) -> list[ShareCurve]:
    """One curve for each varied part, over the range of the trials. With two parts, one curve is enough."""
    columns = dict(zip(domains, np.eye(len(objective)), strict=False)) | {WEIGHTED: objective}
    parts = [index for index, part in enumerate(space.parts) if part.high > part.low]
    curves = []
    for index in parts[:1] if len(space.parts) == 2 else parts:
        reached = [*points[:, index], tuned[index]]
        grid = np.linspace(min(reached), max(reached), CURVE_POINTS)
        path = _path(space.default, index, grid)
        onto = fitted.predict(_path(space.default, index, points[:, index]))
        brought = onto + outputs - fitted.predict(points)
        curves.append(
            ShareCurve(
                part=space.parts[index].name,
                shares=grid.tolist(),
                losses={name: (fitted.predict(path) @ w).tolist() for name, w in columns.items()},
                half_widths={name: fitted.half_width(path, w, LEVEL).tolist() for name, w in columns.items()},
                trial_losses={name: (brought @ w).tolist() for name, w in columns.items()},
            )
        )
    return curves


def _path(default: FloatArray, index: int, shares: FloatArray) -> FloatArray:
    """Points at which one part has the given shares and the others keep the default's proportions. [m] → [m, P]"""
    others = np.delete(default, index)
    total = others.sum()
    proportions = others / total if total else np.full(len(others), 1 / len(others))
    return np.insert((1 - shares)[:, None] * proportions, index, shares, axis=1)
