"""The plan's memory is what real engines take."""

from __future__ import annotations

import pytest

from sparsify.bench.memory import FEW, GRID, Trial, bench_memory


@pytest.mark.parametrize(
    "trials",
    [pytest.param(FEW[:1], marks=pytest.mark.slow), pytest.param(GRID, marks=pytest.mark.slow)],
    ids=["one", "all"],
)
def test_predictions_are_within_15_percent_of_the_measured_peak(trials: tuple[Trial, ...]) -> None:
    measured = bench_memory(trials, lambda _: None)
    assert {one.trial: one.error for one in measured if abs(one.error) > 0.15} == {}
