"""In every prefix of a run, each source has its share to within one sequence."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.sequences.schedule import Anchor, SourceSchedule
from sparsify.mixture.sequences.shares import Shares, ShareSegment
from tests.mixture.laws import assert_law, curves, share_at, weighted

weights = st.lists(st.integers(1, 10_000), min_size=1, max_size=12)


def constant(parts: list[int]) -> SourceSchedule:
    return SourceSchedule(Shares.constant(weighted(parts)))


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
def test_demands_follow_the_shares_and_sum_to_the_sequences(shares: Shares, sequence: int) -> None:
    assert sum(shares.demand(name, sequence) for name in shares.names) == sequence
    for index, name in enumerate(shares.names):
        demand = shares.demand(name, sequence)
        assert 0 <= shares.demand(name, sequence + 1) - demand <= 1
        first = shares.reaches(index, demand.numerator, demand.denominator)
        assert shares.demand(name, int(first)) >= demand
        if first > 0:
            assert shares.demand(name, int(first) - 1) < demand


def test_a_ramp_is_the_area_under_a_straight_line() -> None:
    first, last = {"chat": 0.1, "web": 0.9}, {"chat": 0.3, "web": 0.7}
    shares = Shares([ShareSegment(100, first, first), ShareSegment(200, first, last)])
    assert shares.demand("chat", 100) == 10
    assert shares.demand("chat", 150) == 10 + 50 * Fraction(15, 100)
    assert shares.demand("chat", 200) == 10 + 100 * Fraction(20, 100)
    assert shares.demand("chat", 300) == 30 + 30, "beyond its end a run keeps its last shares"
    assert share_at(shares, "chat", 149) == pytest.approx(0.199)


@settings(max_examples=30, deadline=None)
@given(curves(), st.lists(st.integers(0, 20_000), min_size=1, max_size=8), st.integers(0, 9_000))
def test_the_schedule_does_not_depend_on_where_it_starts(shares: Shares, indices: list[int], start: int) -> None:
    in_order = SourceSchedule(shares)
    expected = {index: in_order.locate(index) for index in sorted(indices)}
    asked = SourceSchedule(shares)
    assert {index: asked.locate(index) for index in indices} == expected
    anchored = SourceSchedule(shares, in_order.anchor(start))
    assert {index: anchored.locate(index) for index in indices} == expected


def test_counts_agree_with_the_sequences_given() -> None:
    schedule = SourceSchedule(Shares.constant({"web": 0.62, "code": 0.25, "chat": 0.13}))
    for num_sequences in (0, 1, 99, 100, 101, 777):
        names = [name for name, _ in schedule.sequences_of(0, num_sequences)]
        assert schedule.counts(num_sequences) == {name: names.count(name) for name in schedule.names}


def test_decimal_shares_are_met_exactly_after_one_period_and_far_into_a_run() -> None:
    schedule = SourceSchedule(Shares.constant({"web": 0.7, "code": 0.2, "chat": 0.1}))
    assert schedule.shares.period == 10
    assert schedule.counts(10**12) == {"web": 7 * 10**11, "code": 2 * 10**11, "chat": 10**11}
    name, rank = schedule.locate(10**12 + 3)
    assert (name, rank - schedule.counts(10**12)[name]) == schedule.locate(3)


def test_shares_that_floats_cannot_represent_are_exact() -> None:
    # 0.1 scaled by 0.85 / 0.9, as the instruction knob does, is a float close to 17/180.
    shares = Shares.constant({"a": 0.7 / 0.9 * 0.85, "b": 0.2 / 0.9 * 0.85, "c": 0.15})
    assert shares.period == 180


def test_an_anchor_makes_a_late_start_with_awkward_shares_fast() -> None:
    shares = Shares([ShareSegment(10**9, {"a": 0.123456789, "b": 0.876543211}, {"a": 0.9, "b": 0.1})])
    sequence = 700_000_000
    given = {name: round(shares.demand(name, sequence)) for name in shares.names}
    given["b"] = sequence - given["a"]
    schedule = SourceSchedule(shares, Anchor(sequence, given))
    assert {name for name, _ in schedule.sequences_of(sequence, 50)} == {"a", "b"}


def test_an_anchor_of_other_shares_is_ignored() -> None:
    shares = Shares.constant({"a": 0.3, "b": 0.7})
    expected = SourceSchedule(shares).sequences_of(0, 60)
    for counts in ({"a": 25, "b": 15}, {"a": 12, "b": 27}, {"a": 12, "c": 28}):
        assert SourceSchedule(shares, Anchor(40, counts)).sequences_of(0, 60) == expected


@settings(max_examples=20, deadline=None)
@given(curves(), st.integers(0, 9_000), st.integers(0, 9_000))
def test_many_sequences_at_once_equal_those_located_one_by_one(shares: Shares, start: int, count: int) -> None:
    schedule = SourceSchedule(shares)
    sequences = schedule.sequences_of(start, count)
    assert len(sequences) == count
    assert sequences[:: count // 7 + 1] == [
        schedule.locate(sequence) for sequence in range(start, start + count, count // 7 + 1)
    ]


@settings(max_examples=40, deadline=None)
@given(curves(), st.integers(0, 600))
def test_planned_sequences_are_at_most_one_from_those_given(shares: Shares, sequence: int) -> None:
    planned, counts = shares.planned(sequence), SourceSchedule(shares).counts(sequence)
    assert sum(planned.values()) == sequence
    assert all(abs(planned[name] - counts[name]) <= 1 for name in shares.names)
