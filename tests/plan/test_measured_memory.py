"""The plan's memory is what real engines take."""

from __future__ import annotations

import pytest

from scripts.validate_memory_plan import GRID, Trial, validate


@pytest.mark.slow
@pytest.mark.parametrize(
    "trials",
    [
        pytest.param([Trial("mistral", 1, "bf16", 1)], id="one_trial"),
        pytest.param(GRID, id="all_trials"),
    ],
)
def test_predictions_are_within_15_percent_of_the_measured_peak(trials: list[Trial]) -> None:
    measured = validate(trials, print)
    assert len(measured) == len(trials)
    assert {one.trial: one.error for one in measured if abs(one.error) > 0.15} == {}
