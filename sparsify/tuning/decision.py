"""The choice: which mixture the regression calls better, by how much, and whether the data support it.

From measured trials to what was found: regression, choice, and how far both can be trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import RecipeError, nearest
from sparsify.tuning.record import WEIGHTED, Curve, Domain, Quality, Trial, TuneRecord
from sparsify.tuning.regression import Fit, fit, left_out_r2
from sparsify.tuning.space import Space
from sparsify.tuning.trials import Measurement, Proxy

FloatArray = NDArray[np.float64]

LEVEL = 0.9
"""Of every interval that is reported."""
NUM_CANDIDATES = 4096
REFINEMENTS = 12
CANDIDATES_SEED = 0


@dataclass(frozen=True)
class Choice:
    """A mixture against the default, in nats per token of the weighted loss. Negative is better.

    Args:
        point: Shares of the parts. [P]
        difference: Expected loss minus that of the default.
        half_width: Half of its interval at LEVEL, paired with the default.
        left_out_error: Root mean square of the leave-one-out errors of the weighted loss.
    """

    point: FloatArray
    difference: float
    half_width: float
    left_out_error: float

    @property
    def reason(self) -> str | None:
        """Why the data do not support this choice; None where they do."""
        if self.difference + self.half_width >= 0:
            return (
                f"the {LEVEL:.0%} interval of its difference to the default, "
                f"{self.difference - self.half_width:+.4f} to {self.difference + self.half_width:+.4f}, holds 0"
            )
        if self.left_out_error >= -self.difference:
            return (
                f"the regression misses a trial that it has not seen by {self.left_out_error:.4f}, "
                f"no less than the improvement of {-self.difference:.4f}"
            )
        return None


def objective_weights(
    domains: Sequence[str], default_shares: Mapping[str, float], given: Sequence[str]
) -> dict[str, float]:
    """Weight of each domain's loss in what is made small; they sum to 1.

    Args:
        domains: All sources of the mixture.
        default_shares: The recipe's own token shares: what a domain weighs unless something is given.
        given: `DOMAIN=FACTOR`: how many times its share this domain weighs.

    Raises:
        RecipeError: If a domain is unknown, a factor is no number, or nothing weighs anything.
    """
    factors: dict[str, float] = {}
    for item in given:
        name, _, text = item.partition("=")
        if name not in domains:
            raise RecipeError(
                f"--weight names {name!r}, which is no source of the mixture.",
                allowed=f"{nearest(name, domains)}Sources: {', '.join(domains)}.",
            )
        factors[name] = _factor(item, text)
        if not default_shares.get(name):
            raise RecipeError(
                f"--weight {item}: {name} has share 0 in the recipe's mixture, so there is nothing to multiply.",
                allowed="A domain weighs FACTOR times its share in the recipe's mixture.",
                next_step=f"Give {name} a small token_share in the mixture first.",
            )
    weights = {name: default_shares.get(name, 0.0) * factors.get(name, 1.0) for name in domains}
    total = sum(weights.values())
    if not total:
        raise RecipeError(
            f"--weight {' '.join(given)} leaves no domain any weight.",
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
            f"--weight {item!r} has no factor.",
            allowed="DOMAIN=FACTOR with a factor of 0 or more: --weight code=2 counts code twice.",
        )
    return factor


def choose(space: Space, fitted: Fit, outputs: FloatArray, weights: FloatArray) -> Choice:
    """The mixture whose improvement over the default is the most certain.

    That is the smallest upper end of the paired interval, so that a mixture far from all trials, of which little is
    known, is not preferred for a guess. Where no interval is on the good side of 0, it is the one with the smallest
    expected loss, which `Choice.reason` then says is not supported.

    Args:
        space: What may be chosen.
        fitted: The regression.
        outputs: What it was fitted to. [n, D]
        weights: Of each output in the weighted loss. [D]
    """
    error = float(np.sqrt((((fitted.left_out - outputs) @ weights) ** 2).mean()))

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
            # The space is convex: a step from the best point towards any other stays inside.
            near = point + (candidates - point) * 0.6**refinement
            near = np.vstack([point, near])
            point = near[int(np.argmin(objective(near)))]
        point = space.point_of(space.source_shares(point))  # as it will be written
        chosen = Choice(
            point, float(difference(point[None])[0]), float(half_width(point[None])[0]), error
        )
        if chosen.difference + chosen.half_width < 0:
            break
    return chosen


CURVE_POINTS = 61
NEAR_BOUND = 2e-3


def conclude(
    space: Space, weights: Mapping[str, float], measured: Sequence[tuple[Proxy, Measurement]]
) -> TuneRecord:
    """Fits the trials and chooses a mixture.

    Args:
        space: What was varied.
        weights: Of each domain's loss; they sum to 1.
        measured: The trials; the first is the default mixture.
    """
    delivered = [proxy.delivered_shares for proxy, _ in measured]
    points = np.array([space.point_of(shares) for shares in delivered])
    outputs = np.array(
        [[*(one.losses[name] for name in weights), one.zeros] for _, one in measured]
    )
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
            left_out_error=quality[index].left_out_error,
            left_out_r2=quality[index].left_out_r2,
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
    """Bounds that keep the choice from going on; no share goes below 0 or above 1."""
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
) -> list[Trial]:
    rows = zip(measured, delivered, points, outputs, fitted.left_out, strict=True)
    return [
        Trial(
            folder=str(proxy.run.path),
            shares=shares,
            part_shares=point.tolist(),
            losses=one.losses,
            left_out_losses=dict(zip(one.losses, left_out.tolist(), strict=False)),
            weighted_loss=float(output @ objective),
            left_out_weighted_loss=float(left_out @ objective),
            zeros=one.zeros,
            left_out_zeros=float(left_out[-1]),
        )
        for (proxy, one), shares, point, output, left_out in rows
    ]


def _quality(fitted: Fit, outputs: FloatArray, weights: FloatArray) -> Quality:
    observed, left_out = outputs @ weights, fitted.left_out @ weights
    return Quality(
        left_out_error=float(np.sqrt(((observed - left_out) ** 2).mean())),
        left_out_r2=float(left_out_r2(left_out[:, None], observed[:, None])[0]),
    )


def _curves(
    space: Space,
    domains: Sequence[str],
    points: FloatArray,
    outputs: FloatArray,
    fitted: Fit,
    objective: FloatArray,
    tuned: FloatArray,
) -> list[Curve]:
    """One curve for each part that varies, as far as trials reach; of two parts the second would mirror the first."""
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
            Curve(
                part=space.parts[index].name,
                shares=grid.tolist(),
                losses={name: (fitted.predict(path) @ w).tolist() for name, w in columns.items()},
                half_widths={
                    name: fitted.half_width(path, w, LEVEL).tolist() for name, w in columns.items()
                },
                trial_losses={name: (brought @ w).tolist() for name, w in columns.items()},
            )
        )
    return curves


def _path(default: FloatArray, index: int, shares: FloatArray) -> FloatArray:
    """Points at which one part has these shares and the others keep the default's proportions. [m] → [m, P]"""
    others = np.delete(default, index)
    total = others.sum()
    proportions = others / total if total else np.full(len(others), 1 / len(others))
    return np.insert((1 - shares)[:, None] * proportions, index, shares, axis=1)
