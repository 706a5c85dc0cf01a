"""The loop that ends at a target: on plants of every gain and delay, and with its state saved at any step."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sparsify.methods.controller import RAMP_SHARE, Controller

STEPS = 400
LIMIT = 300.0


def begin(zeros: float, begun_at: float = 0.0) -> Controller:
    return Controller(0.02, LIMIT, 1 - zeros, 1 - zeros, begun_at)


def run(target: float, gain: float, rate: float, first: float, start: float = 0.0, stop: int = STEPS) -> list[float]:
    """Zeros of every step on a plant that answers with a delay: dy/dt = rate (gain ln(weight / first weight) + y0 - y).

    Args:
        target: Share of zeros to end at.
        gain: What y rises by in the end when the weight is e times as large.
        rate: How often a run the delay fits into it.
        first: Share of zeros without a penalty.
        start: Share of the budget at which the controller begins.
        stop: Step after which the state goes through JSON's types once.
    """
    y = rest = -math.log1p(-first)
    controller = begin(first, start)
    zeros, step_share = [], (1 - start) / STEPS
    for step in range(STEPS):
        share = start + step * step_share
        pushed = math.log(controller.weight(1 - target, share) / controller.first_weight)
        y += rate / STEPS * (gain * pushed + rest - y)
        zeros.append(1 - math.exp(-max(y, 0.0)))
        controller = controller.after_step(1 - target, 1 - zeros[-1], share + step_share, step_share)
        if step == stop:
            controller = Controller(**json.loads(json.dumps(controller.saved())))
    return zeros


@given(
    st.floats(0.15, 1.0),
    st.floats(3.0, 30.0),
    st.floats(0.3, 0.85),
    st.floats(0.0, 0.5),
)
def test_it_ends_at_the_target_without_swinging(gain: float, rate: float, first: float, start: float) -> None:
    away = math.log((1 - first) / (1 - 0.9))
    assume(away < 0.8 * gain * math.log(LIMIT))  # else the weight's limit is in the way
    zeros = run(0.9, gain, rate, first, start)
    assert zeros[-1] == pytest.approx(0.9, abs=0.012)
    # Swinging would be a rise after a fall, or the other way round, again and again.
    turns = [
        step
        for step in range(2, STEPS)
        if (zeros[step] - zeros[step - 1]) * (zeros[step - 1] - zeros[step - 2]) < -1e-12
    ]
    assert len(turns) <= 3
    assert max(zeros) < 0.9 + 0.02


def path(first: float, target: float, budget_share: float) -> float:
    """Half a sine wave of -ln(1 - zeros), which ends at RAMP_SHARE of the budget."""
    y, end = -math.log1p(-first), -math.log1p(-target)
    x = min(1.0, budget_share / RAMP_SHARE)
    return 1 - math.exp(-(y + (end - y) * (1 - math.cos(math.pi * x)) / 2))


def test_it_follows_its_path() -> None:
    zeros = run(0.9, 0.5, 10.0, 0.5)
    wanted = [path(0.5, 0.9, step / STEPS) for step in range(STEPS)]
    assert max(abs(a - b) for a, b in zip(zeros, wanted, strict=True)) < 0.06


def test_zeros_beyond_the_target_lower_the_penalty() -> None:
    controller = begin(0.95)
    assert controller.weight(0.1, 0.1) < 0.01 * controller.first_weight
    assert run(0.9, 0.3, 10.0, 0.95)[-1] < 0.95


def test_what_cannot_be_reached_does_not_run_away() -> None:
    controller = begin(0.5)
    for step in range(STEPS):
        controller = controller.after_step(0.01, 0.5, (step + 1) / STEPS, 1 / STEPS)
    # The weight stays within its limit, and the integral is not wound up behind it.
    assert controller.weight(0.01, 1.0) == pytest.approx(LIMIT * controller.first_weight)
    let_go = controller.after_step(0.01, 0.005, 1.0, 1 / STEPS)
    assert let_go.weight(0.01, 1.0) < 0.1 * controller.weight(0.01, 1.0)


def test_an_interruption_changes_nothing() -> None:
    assert run(0.9, 0.4, 8.0, 0.6) == run(0.9, 0.4, 8.0, 0.6, stop=137)
