"""Every prefix of a run has each source's share to the window, whatever the schedule."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.plan import Anchor, SourceSchedule
from sparsify.mixture.shares import Shares, Stretch, last_window_within, redistributed

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


def shares_of(parts: list[int]) -> dict[str, float]:
    return {f"source{i}": part / sum(parts) for i, part in enumerate(parts)}


def constant(parts: list[int]) -> SourceSchedule:
    return SourceSchedule(Shares.constant(shares_of(parts)))


@st.composite
def curves(draw: st.DrawFn) -> Shares:
    """Up to five stretches of constant or moving shares, sources that come and go among them."""
    num_sources = draw(st.integers(1, 12))
    part = st.integers(0, 1000)
    row = st.lists(part, min_size=num_sources, max_size=num_sources).filter(any)
    end, stretches = 0, []
    for _ in range(draw(st.integers(1, 5))):
        end += draw(st.integers(1, 120))
        first = shares_of(draw(row))
        last = shares_of(draw(row)) if draw(st.booleans()) else first
        stretches.append(Stretch(end, first, last))
    return Shares(stretches)


def assert_law(schedule: SourceSchedule, num_windows: int) -> None:
    """Windows come in order, none twice, and never a whole one off their demand."""
    shares, names = schedule.shares, schedule.names
    bound = 1 - Fraction(1, max(2 * len(names) - 2, 1))
    given_windows = dict.fromkeys(names, 0)
    for count, (name, rank) in enumerate(schedule.windows_of(0, num_windows), start=1):
        assert rank == given_windows[name]
        given_windows[name] += 1
        for source, windows in given_windows.items():
            assert abs(windows - shares.demand(source, count)) <= bound


@settings(max_examples=40, deadline=None)
@given(weights)
def test_shares_are_exact_at_every_prefix(parts: list[int]) -> None:
    assert_law(constant(parts), 300)


@settings(max_examples=60, deadline=None)
@given(curves())
def test_changing_shares_are_exact_at_every_prefix(shares: Shares) -> None:
    assert_law(SourceSchedule(shares), 400)


@settings(max_examples=40, deadline=None)
@given(curves(), st.integers(0, 500))
def test_demands_follow_the_shares_and_sum_to_the_windows(shares: Shares, window: int) -> None:
    assert sum(shares.demand(name, window) for name in shares.names) == window
    for index, name in enumerate(shares.names):
        demand = shares.demand(name, window)
        assert 0 <= shares.demand(name, window + 1) - demand <= 1
        first = shares.reaches(index, demand.numerator, demand.denominator)
        assert shares.demand(name, int(first)) >= demand
        if first > 0:
            assert shares.demand(name, int(first) - 1) < demand


def test_a_ramp_is_the_area_under_a_straight_line() -> None:
    first, last = {"chat": 0.1, "web": 0.9}, {"chat": 0.3, "web": 0.7}
    shares = Shares([Stretch(100, first, first), Stretch(200, first, last)])
    assert shares.demand("chat", 100) == 10
    assert shares.demand("chat", 150) == 10 + 50 * Fraction(15, 100)
    assert shares.demand("chat", 200) == 10 + 100 * Fraction(20, 100)
    assert shares.demand("chat", 300) == 30 + 30, "beyond its end a run keeps its last shares"
    assert shares.share("chat", 149) == pytest.approx(0.199)


@settings(max_examples=30, deadline=None)
@given(curves(), st.lists(st.integers(0, 20_000), min_size=1, max_size=8), st.integers(0, 9_000))
def test_the_schedule_does_not_depend_on_where_one_begins(
    shares: Shares, indices: list[int], start: int
) -> None:
    in_order = SourceSchedule(shares)
    expected = {index: in_order.locate(index) for index in sorted(indices)}
    asked = SourceSchedule(shares)
    assert {index: asked.locate(index) for index in indices} == expected
    anchored = SourceSchedule(shares, in_order.anchor(start))
    assert {index: anchored.locate(index) for index in indices} == expected


def test_counts_agree_with_the_windows_given() -> None:
    schedule = SourceSchedule(Shares.constant({"web": 0.62, "code": 0.25, "chat": 0.13}))
    for num_windows in (0, 1, 99, 100, 101, 777):
        names = [name for name, _ in schedule.windows_of(0, num_windows)]
        assert schedule.counts(num_windows) == {name: names.count(name) for name in schedule.names}


def test_decimal_shares_are_met_exactly_after_one_period_and_far_into_a_run() -> None:
    schedule = SourceSchedule(Shares.constant({"web": 0.7, "code": 0.2, "chat": 0.1}))
    assert schedule.shares.period == 10
    assert schedule.counts(10**12) == {"web": 7 * 10**11, "code": 2 * 10**11, "chat": 10**11}
    name, rank = schedule.locate(10**12 + 3)
    assert (name, rank - schedule.counts(10**12)[name]) == schedule.locate(3)


def test_shares_that_floats_cannot_hold_lose_nothing() -> None:
    # 0.1 scaled by 0.85 / 0.9, as the instruction knob does, is a float close to 17/180.
    shares = Shares.constant({"a": 0.7 / 0.9 * 0.85, "b": 0.2 / 0.9 * 0.85, "c": 0.15})
    assert shares.period == 180


def test_an_anchor_answers_far_into_a_run_of_awkward_shares_at_once() -> None:
    shares = Shares([Stretch(10**9, {"a": 0.123456789, "b": 0.876543211}, {"a": 0.9, "b": 0.1})])
    window = 700_000_000
    given = {name: round(shares.demand(name, window)) for name in shares.names}
    given["b"] = window - given["a"]
    schedule = SourceSchedule(shares, Anchor(window, given))
    assert {name for name, _ in schedule.windows_of(window, 50)} == {"a", "b"}


@settings(max_examples=60, deadline=None)
@given(curves(), st.integers(1, 60), st.integers(0, 11), st.integers(1, 60))
def test_an_exhausted_source_gives_no_more_than_it_has_and_the_law_holds(
    shares: Shares, capacity: int, number: int, other_capacity: int
) -> None:
    name, other = shares.names[number % len(shares.names)], shares.names[0]
    capacities = {name: capacity, other: other_capacity}
    changed = redistributed(shares, capacities)
    schedule = SourceSchedule(changed)
    assert_law(schedule, 400)
    fits = min(last_window_within(changed, one, size) for one, size in capacities.items())
    counts = schedule.counts(int(min(fits, 400)))
    assert all(counts.get(one, 0) <= size for one, size in capacities.items())


def test_a_share_is_given_to_the_others_in_proportion() -> None:
    shares = Shares.constant({"small": 0.5, "web": 0.4, "code": 0.1})
    changed = redistributed(shares, {"small": 10})
    turn = int(last_window_within(shares, "small", 10))
    assert 17 <= turn <= 20
    assert changed.share("small", turn + 5) == 0
    assert changed.share("web", turn + 5) == pytest.approx(0.8)
    assert SourceSchedule(changed).counts(1000)["small"] in (9, 10)


def test_the_budget_that_fits_a_cap_is_the_last_before_it_would_break() -> None:
    shares = Shares.constant({"small": 0.25, "web": 0.75})
    fits = int(last_window_within(shares, "small", 10))
    schedule = SourceSchedule(shares)
    assert schedule.counts(fits)["small"] <= 10
    assert schedule.counts(fits + 8)["small"] > 10
