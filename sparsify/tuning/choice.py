"""The choice: which mixture the regression calls better, by how much, and whether the data support it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.errors import RecipeError, nearest
from sparsify.tuning.regression import Fit
from sparsify.tuning.space import Space

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
