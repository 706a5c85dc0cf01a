from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.plan import SourceSchedule

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


def shares_of(parts: list[int]) -> dict[str, float]:
    return {f"source{i}": part / sum(parts) for i, part in enumerate(parts)}


@settings(max_examples=40, deadline=None)
@given(weights)
def test_shares_are_exact_at_every_prefix(parts: list[int]) -> None:
    schedule = SourceSchedule(shares_of(parts))
    bound = 1 - Fraction(1, max(2 * len(parts) - 2, 1))
    given_windows = dict.fromkeys(schedule.names, 0)
    for num_windows, (name, rank) in enumerate(schedule.windows_of(0, 300), start=1):
        assert rank == given_windows[name], "a source's windows come in order, none twice"
        given_windows[name] += 1
        for source, count in given_windows.items():
            assert abs(count - schedule.shares[source] * num_windows) <= bound


@settings(max_examples=30, deadline=None)
@given(weights, st.lists(st.integers(0, 20_000), min_size=1, max_size=8))
def test_the_schedule_does_not_depend_on_the_order_of_asking(
    parts: list[int], indices: list[int]
) -> None:
    shares = shares_of(parts)
    in_order = SourceSchedule(dict(reversed(shares.items())))
    expected = {index: in_order.locate(index) for index in sorted(indices)}
    asked = SourceSchedule(shares)
    assert {index: asked.locate(index) for index in indices} == expected


def test_counts_agree_with_the_windows_given() -> None:
    schedule = SourceSchedule({"web": 0.62, "code": 0.25, "chat": 0.13})
    for num_windows in (0, 1, 99, 100, 101, 777):
        names = [name for name, _ in schedule.windows_of(0, num_windows)]
        assert schedule.counts(num_windows) == {name: names.count(name) for name in schedule.names}


def test_decimal_shares_are_met_exactly_after_one_period_and_far_into_a_run() -> None:
    schedule = SourceSchedule({"web": 0.7, "code": 0.2, "chat": 0.1})
    assert schedule.period == 10
    assert schedule.counts(10**12) == {"web": 7 * 10**11, "code": 2 * 10**11, "chat": 10**11}
    name, rank = schedule.locate(10**12 + 3)
    assert (name, rank - schedule.counts(10**12)[name]) == schedule.locate(3)


def test_shares_that_floats_cannot_hold_lose_nothing() -> None:
    # 0.1 scaled by 0.85 / 0.9, as the instruction knob does, is a float close to 17/180.
    schedule = SourceSchedule({"a": 0.7 / 0.9 * 0.85, "b": 0.2 / 0.9 * 0.85, "c": 0.15})
    assert schedule.period == 180
    assert sum(schedule.shares.values()) == 1
