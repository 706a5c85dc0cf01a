"""The spike rule: silent on healthy runs of every batch size, and still finds planted spikes and divergence."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.bench.spikes import Judge, Step, count_spikes, healthy_run
from sparsify.recipe.training import StabilitySection
from sparsify.training.spikes import spike_rule
from sparsify.training.stability import find_bad, nan_if_bad

SETTINGS = StabilitySection(recent_steps=16, max_bad_steps=4)


@pytest.mark.parametrize(
    ("sequences", "sources", "memorising"), [(1, 1, True), (1, 3, False), (8, 5, True), (512, 3, False)]
)
def test_no_false_alarm_on_healthy_runs_and_planted_faults_are_found(
    sequences: int, sources: int, memorising: bool
) -> None:
    steps = healthy_run(3, sequences, sources, 1500, memorising=memorising)
    count = count_spikes("", steps, sequences, StabilitySection(), 150)
    assert (count.steps, count.false_alarms) == (1500, 0)
    missed = {kind: one.planted - one.found for kind, one in count.planted.items() if one.planted >= 9}
    assert missed["divergence"] == 0
    if sequences >= 8:
        assert missed["five steps"] == 0
    if sequences >= 64:
        assert missed["one step"] == 0
        assert (count.planted["divergence"].steps_to_find or 99) <= 4


def test_a_run_that_knows_its_text_by_heart_meets_a_sequence_that_it_does_not() -> None:
    # What ended a healthy run at one sequence a step: a median of 0.3, and now and then 4 nats.
    judge = Judge(StabilitySection())
    losses = [4.0 + (number % 3) * 0.5 if number % 37 == 36 else 0.3 + 0.01 * (number % 5) for number in range(1500)]
    assert not any(judge.is_spike(Step({"a": loss}, {"a": 127}, {"a": 1})) for loss in losses)
    # A document that is odd altogether is none either; loss that stays up is.
    assert not any(judge.is_spike(Step({"a": 9.0}, {"a": 127}, {"a": 1})) for _ in range(2))
    assert any(judge.is_spike(Step({"a": 9.0}, {"a": 127}, {"a": 1})) for _ in range(32))


@given(
    st.lists(st.floats(1.9, 2.1), min_size=8, max_size=16),
    st.lists(st.floats(3.9, 4.1), min_size=8, max_size=16),
    st.floats(0, 1),
)
def test_other_shares_are_no_spike(low: list[float], high: list[float], share: float) -> None:
    recent = [{"a": a, "b": b} for a, b in zip(low, high, strict=False)]
    labels = {"a": round(share * 1000), "b": 1000 - round(share * 1000)}
    rule = spike_rule(SETTINGS, recent, [], labels, {"a": 500, "b": 500})
    assert rule is not None
    expected = (labels["a"] * 2 + labels["b"] * 4) / 1000
    assert expected + 0.05 < rule.limit < 2 * expected


def test_a_spike_is_judged_by_sources_that_were_seen_often_enough() -> None:
    recent: list[dict[str, float] | None] = [{"a": 2.0 + 0.01 * (i % 3)} for i in range(8)]
    one = {"a": 100, "new": 1}
    assert spike_rule(SETTINGS, recent[:3], [], {"a": 10}, {"a": 100}) is None
    assert spike_rule(SETTINGS, recent, [], {"a": 10, "new": 10}, one) is None
    rule = spike_rule(SETTINGS, [*recent, None], [], {"a": 10, "new": 1}, one)
    assert rule is not None
    sources = ["a", "new"]
    for losses, good in (
        ([20.0, 90.0], True),
        ([40.0, 2.0], False),
        ([20.0, math.inf], False),
        ([math.nan, 2.0], False),
    ):
        factor = float(nan_if_bad(torch.tensor(losses).double(), sources, rule))
        assert (factor == 1.0) is good
    bad = find_bad(9, [40.0, 2.0], sources, 64, rule)
    assert bad.suspects == {"a": [64]}
    assert bad.rise == pytest.approx(2.0, abs=0.02)
    bad = find_bad(9, [20.0, math.inf], sources, 64, rule)
    assert (bad.suspects, bad.rise) == ({"new": [65]}, None)


def test_the_batch_decides_how_far_a_single_step_may_rise() -> None:
    recent = [{"a": 2.0 + 0.02 * (i % 5)} for i in range(16)]
    limits = []
    for sequences in (1, 8, 2048):
        rule = spike_rule(SETTINGS, recent, [0.0] * 16, {"a": sequences}, {"a": sequences})
        assert rule is not None
        limits.append(rule.limit - rule.expected)
    assert limits[0] > 3
    assert 0.7 < limits[1] < 2
    assert 0.1 < limits[2] < 0.3


def test_high_steps_before_lower_the_limit_and_an_ordinary_step_among_them_is_none() -> None:
    recent = [{"a": 2.0 + 0.02 * (i % 5)} for i in range(128)]
    after = spike_rule(StabilitySection(), recent, [0.0] * 113 + [5.0] * 15, {"a": 1}, {"a": 1})
    assert after is not None
    assert 0.1 < after.limit - after.expected < 0.3


def test_divergence_that_creeps_up_is_found() -> None:
    judge = Judge(StabilitySection())
    calm = [Step({"a": 2.5 + 0.01 * (i % 7)}, {"a": 1000}, {"a": 64}) for i in range(200)]
    assert not any(map(judge.is_spike, calm))
    creeping = [Step({"a": 2.5 + 0.05 * i}, {"a": 1000}, {"a": 64}) for i in range(40)]
    assert any(map(judge.is_spike, creeping))
