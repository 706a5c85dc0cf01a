"""A weight of the loss that follows what is measured, so that a run ends at a wanted share of what is on: neurons that fire, groups
that are computed.

What is controlled is y = -ln(share that is on), in which halving it is the same step everywhere. It follows a path from where it was
found to the target, half a sine wave that ends at RAMP_SHARE of the way, and stays there. The weight is

    weight = first weight * exp(GAIN * (e + INTEGRAL_RATE * integral of e)),    e = path - y,

with progress as time: a proportional-integral law for the logarithm of the weight. The share responds to the weight with a delay,
dy/dt = a (g ln weight - y) near any point; then the loop's two poles are real, so that it cannot oscillate, for every g as long as a
is at least INTEGRAL_RATE: a (1 + g GAIN)^2 >= 4 a g GAIN >= 4 INTEGRAL_RATE g GAIN.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

RAMP_SHARE = 0.7
"""Of the way from where the controller begins to the end: the rest is for the weights to settle at the target."""
GAIN = 8.0
INTEGRAL_RATE = 3.0
ALMOST_NONE = 1e-6
"""Shares below it count as this one."""


@dataclass(frozen=True)
class Controller:
    """State of the loop between two steps; plain numbers, saved with the counters.

    Attributes:
        first_weight: Weight that it began with.
        limit: Largest factor by which the weight may exceed the first one, or be below it.
        first_on: Share that was found to be on where it began, 0 to 1.
        on: That of the newest step.
        begun_at: Progress at which it began, 0 to below 1.
        integral: Integral of the error over progress.
    """

    first_weight: float
    limit: float
    first_on: float
    on: float
    begun_at: float = 0.0
    integral: float = 0.0

    def saved(self) -> dict[str, float]:
        return asdict(self)

    def weight(self, target: float, progress: float) -> float:
        """The weight for the step that begins at this progress; `target` is the share that is to be on at the end."""
        return self.first_weight * math.exp(self._exponent(target, progress))

    def after_step(self, target: float, on: float, progress: float, step: float) -> Controller:
        """Takes in one step, which ended at `progress`, and of which `step` was its own."""
        now = replace(self, on=on)
        error, exponent = now._error(target, progress), now._exponent(target, progress)
        if abs(exponent) >= math.log(self.limit) and error * exponent > 0:
            return now  # winding the integral up further would only delay the way back
        return replace(now, integral=self.integral + error * step / max(1 - self.begun_at, step))

    def _exponent(self, target: float, progress: float) -> float:
        exponent = GAIN * (self._error(target, progress) + INTEGRAL_RATE * self.integral)
        most = math.log(self.limit)
        return max(-most, min(most, exponent))

    def _error(self, target: float, progress: float) -> float:
        return self._wanted(target, progress) - _sparsity(self.on)

    def _wanted(self, target: float, progress: float) -> float:
        last = _sparsity(target)
        # From below the target there is no way to go: the weight only ever switches off.
        first = min(_sparsity(self.first_on), last)
        left = max(1 - self.begun_at, 1e-9)
        x = min(1.0, max(0.0, (progress - self.begun_at) / (RAMP_SHARE * left)))
        return first + (last - first) * (math.sin(math.pi * (x - 0.5)) + 1) / 2


def _sparsity(on: float) -> float:
    return -math.log(max(on, ALMOST_NONE))
