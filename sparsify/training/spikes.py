"""The spike rule: how high the loss of the next step may be, as arithmetic on the losses of the steps before it.

`sparsify bench spikes` counts its false alarms on healthy runs, and what it finds of planted spikes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from sparsify.recipe.training import StabilitySection

LEAST_DEVIATION = 0.01
"""Of a source's expected loss: what it varies by at least, so that a run of equal losses makes no spikes."""
ODD_NATS = 12.0
"""How far a single sequence of any content may lie above the others: a little more than the loss of random tokens."""
ODD_SEQUENCES = {1: 1, 4: 2, 16: 4, 64: 8}
"""Over so many steps, so many odd sequences make no spike."""

Losses = dict[str, float]


@dataclass(frozen=True)
class SpikeRule:
    """How high the loss of the next step may be.

    Attributes:
        sources: Sources that were seen often enough to have an expected loss.
        expected: Mean loss of those sequences' labels that recent steps let expect, in nats.
        limit: Highest mean loss of those sequences' labels that is no spike, in nats.
        num_labels: Labels of those sources in the step.
    """

    sources: frozenset[str]
    expected: float
    limit: float
    num_labels: int


def spike_rule(
    settings: StabilitySection,
    recent: Sequence[Mapping[str, float] | None],
    rises: Sequence[float | None],
    num_labels: Mapping[str, int],
    num_sequences: Mapping[str, int],
) -> SpikeRule | None:
    """What recent losses let expect of a step.

    The expected loss of a source is the mean of its recent losses, the expected loss of a step their mean, weighted by its
    labels: a change of the mixture's shares is not a spike. The newest half does not count, so that a rise does not
    raise what it is compared with. A step is a spike if the mean rise above the expected loss, over the last k steps for one k of
    ODD_SEQUENCES, exceeds `spike_deviations` standard deviations of such means, and what ODD_SEQUENCES odd sequences among all of
    these steps could add. So a step of one sequence is compared together with those before it, a step of a thousand alone.

    Args:
        settings: The rule's numbers.
        recent: Losses of the sources at recent good steps in nats; None for bad steps.
        rises: How far the loss of each recent step, good or bad, was above the expected one; None where it was not finite.
        num_labels: Labels of each source in this step.
        num_sequences: Sequences of each source in this step.

    Returns:
        None when half of the labels or more are of sources that were not seen often enough.
    """
    if settings.spike_deviations is None:
        return None
    quarter, half = settings.recent_steps // 4, settings.recent_steps // 2
    good = [step for step in recent if step is not None]
    good = good[: max(quarter, len(good) - half)]
    means: Losses = {}
    for source, count in num_labels.items():
        losses = [step[source] for step in good if source in step]
        if count and len(losses) >= max(2, settings.recent_steps // 16):
            means[source] = fmean(losses)
    limited = sum(num_labels[source] for source in means)
    if len(good) < max(2, quarter) or 2 * limited <= sum(num_labels.values()):
        return None
    expected = sum(num_labels[source] * mean for source, mean in means.items()) / limited
    sequences = sum(num_sequences[source] for source in means)
    least = settings.spike_deviations * LEAST_DEVIATION * abs(expected)
    residuals = np.array(_residuals(good, num_labels))
    rise = math.inf
    for steps, odd in ODD_SEQUENCES.items():
        if steps - 1 <= min(len(rises), half):
            noise = max(least, settings.spike_deviations * _deviation(residuals, steps))
            highest = noise + odd * ODD_NATS / (sequences * steps)
            before = sum(one or 0.0 for one in rises[len(rises) - steps + 1 :])
            rise = min(rise, steps * highest - before)
    # Among high steps an ordinary one is none.
    rise = max(rise, least, _deviation(residuals, 1))
    return SpikeRule(frozenset(means), expected, expected + rise, limited)


def _residuals(steps: Sequence[Mapping[str, float]], num_labels: Mapping[str, int]) -> list[float]:
    """How far the loss of each step lies from the means of its sources, weighted by the labels of the step to come."""
    by_source: dict[str, list[float]] = {}
    for step in steps:
        for source, loss in step.items():
            by_source.setdefault(source, []).append(loss)
    means = {source: fmean(losses) for source, losses in by_source.items()}
    residuals = []
    for step in steps:
        weights = {source: num_labels.get(source, 0) for source in step}
        total = sum(weights.values())
        if not total:  # sources that the step to come does not have
            weights, total = dict.fromkeys(step, 1), len(step)
        if total:
            residuals.append(sum(weight * (step[source] - means[source]) for source, weight in weights.items()) / total)
    return residuals


def _deviation(residuals: NDArray[np.float64], steps: int) -> float:
    """Standard deviation of means of so many steps in a row: as found, or more, as if they were independent."""
    independent = residuals.var() / steps
    sums = np.concatenate(([0.0], residuals.cumsum()))
    found = (sums[steps:] - sums[:-steps]) / steps
    return math.sqrt(max(independent, np.square(found).mean()) if len(found) else independent)
