"""From measured trials to what was found: regression, choice, and how far both can be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from sparsify.tuning.choice import LEVEL, choose
from sparsify.tuning.measurement import Measurement
from sparsify.tuning.record import WEIGHTED, Curve, Domain, Quality, Trial, TuneRecord
from sparsify.tuning.regression import Fit, fit, left_out_r2
from sparsify.tuning.space import Space
from sparsify.tuning.trials import Proxy

FloatArray = NDArray[np.float64]
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
