"""A target for the share of zeros: the penalty's weight follows what is measured, so that the run ends at the target.

What is controlled is y = -ln(1 - zeros), in which halving the neurons that fire is the same step everywhere. It shall follow a path
from where it was found to the target, half a sine wave that ends at RAMP_SHARE of the way, and stay there. The weight is

    weight = first weight * exp(GAIN * (e + INTEGRAL_RATE * integral of e)),    e = path - y,

with progress through the run as time: a proportional-integral law for the logarithm of the weight. Zeros answer to the weight with
a delay, dy/dt = a (g ln weight - y) near any point; then the loop's two poles are real, so that it cannot oscillate, for every
g as long as a is at least INTEGRAL_RATE: a (1 + g GAIN)^2 >= 4 a g GAIN >= 4 INTEGRAL_RATE g GAIN.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace

RAMP_SHARE = 0.7
"""Of the way from where control begins to the end of the run: what is left is for the weights to settle at the target."""
GAIN = 8.0
INTEGRAL_RATE = 3.0
FIRST_LOSS_SHARE = 0.003
"""The penalty begins at this share of the loss."""
MAX_EXPONENT = -math.log(FIRST_LOSS_SHARE)
"""The weight stays below the one with which the first penalty would equal the loss, and above the first as far below."""
ALMOST_ALL = 1 - 1e-6


@dataclass(frozen=True)
class Control:
    """State of the loop between two steps; plain numbers, saved with the counters.

    Attributes:
        begun_at: Share of the budget at which it began.
        first_zeros: Share of zeros that was found there.
        first_weight: Weight that it began with.
        zeros: Share of zeros of the newest step.
        integral: Integral of the error over progress.
    """

    begun_at: float
    first_zeros: float
    first_weight: float
    zeros: float
    integral: float = 0.0

    @classmethod
    def of(cls, saved: dict[str, float]) -> Control | None:
        """The state that `saved` returned; None for an empty one: control has not begun."""
        return cls(**saved) if saved else None

    def saved(self) -> dict[str, float]:
        """As numbers that JSON can hold."""
        return asdict(self)


def begin(budget_share: float, zeros: float, loss: float, penalty: float) -> Control:
    """Takes over after the first step that was measured with the plain activation.

    Args:
        budget_share: Tokens seen as a share of the budget.
        zeros: Share of zeros of that step.
        loss: Its loss, in nats.
        penalty: Its penalty before any weight.
    """
    first_weight = FIRST_LOSS_SHARE * loss / max(penalty, 1e-12)
    return Control(budget_share, zeros, first_weight, zeros)


def weight(control: Control, target: float, budget_share: float) -> float:
    """The penalty's weight for the step that begins at this share of the budget."""
    return control.first_weight * math.exp(_exponent(control, target, budget_share))


def after_step(
    control: Control, target: float, zeros: float, budget_share: float, step_share: float
) -> Control:
    """Takes in one step.

    Args:
        control: The state before it.
        target: Share of zeros that is wanted at the end.
        zeros: Share of zeros of the step.
        budget_share: Tokens seen at its end, as a share of the budget.
        step_share: Its tokens as a share of the budget.
    """
    now = replace(control, zeros=zeros)
    error = _error(now, target, budget_share)
    exponent = _exponent(now, target, budget_share)
    if abs(exponent) >= MAX_EXPONENT and error * exponent > 0:
        return now  # winding the integral up further would only delay the way back
    left = max(1 - control.begun_at, step_share)
    return replace(now, integral=control.integral + error * step_share / left)


def path(control: Control, target: float, budget_share: float) -> float:
    """Share of zeros that is wanted at this share of the budget."""
    return 1 - math.exp(-_wanted(control, target, budget_share))


def _exponent(control: Control, target: float, budget_share: float) -> float:
    error = _error(control, target, budget_share)
    exponent = GAIN * (error + INTEGRAL_RATE * control.integral)
    return max(-MAX_EXPONENT, min(MAX_EXPONENT, exponent))


def _error(control: Control, target: float, budget_share: float) -> float:
    return _wanted(control, target, budget_share) - _sparsity(control.zeros)


def _wanted(control: Control, target: float, budget_share: float) -> float:
    first, last = _sparsity(control.first_zeros), _sparsity(target)
    left = max(1 - control.begun_at, 1e-9)
    x = min(1.0, max(0.0, (budget_share - control.begun_at) / (RAMP_SHARE * left)))
    # From above the target there is no way to go: pressure only ever makes more zeros.
    first = min(first, last)
    return first + (last - first) * (math.sin(math.pi * (x - 0.5)) + 1) / 2


def _sparsity(zeros: float) -> float:
    """-ln(1 - zeros): grows by ln 2 when half of the neurons that fire fall silent."""
    return -math.log1p(-min(zeros, ALMOST_ALL))
