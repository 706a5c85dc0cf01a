"""No source is seen more often than max_epochs, and an error names a budget that fits."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import MixtureError
from sparsify.mixture.sequences.epoch_caps import (
    capped_shares,
    first_exceeded,
    fitting_steps,
    last_sequence_within,
    most_sequences,
    redistributed,
)
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import Shares, ShareSegment
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.mixture import MixtureSection, PhaseSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.source import SourceSection
from sparsify.runs.data import shares_of
from tests.mixture.laws import assert_law, curves, share_at, weighted

capacities_of_12 = st.lists(st.none() | st.integers(0, 80), min_size=12, max_size=12)


@settings(max_examples=80, deadline=None)
@given(curves(), capacities_of_12)
def test_an_exhausted_source_gives_no_more_than_it_has_and_shares_stay_exact(
    shares: Shares, sizes: list[int | None]
) -> None:
    pairs = zip(shares.names, sizes, strict=False)
    capacities = {name: size for name, size in pairs if size is not None}
    changed = redistributed(shares, capacities)
    schedule = SourceSchedule(changed)
    assert_law(schedule, 400)
    fits = min((last_sequence_within(changed, *cap) for cap in capacities.items()), default=400)
    counts = schedule.counts(int(min(fits, 400)))
    assert all(counts.get(name, 0) <= size for name, size in capacities.items())
    if fits < 400:  # only if no other source is left
        after = int(fits) + 1
        with_share = {name for name in changed.names if share_at(changed, name, after) > 0}
        assert with_share <= capacities.keys()


@settings(max_examples=60, deadline=None)
@given(curves(), st.integers(0, 60))
def test_a_source_can_give_everything_it_has(shares: Shares, capacity: int) -> None:
    name = shares.names[0]
    fits = last_sequence_within(shares, name, capacity)
    if fits < 2000:
        assert shares.demand(name, int(fits)) < capacity + Fraction(1, 2)
        assert shares.demand(name, int(fits) + 1) > capacity
        assert SourceSchedule(shares).counts(int(fits))[name] <= capacity


def test_a_share_is_given_to_the_others_in_proportion() -> None:
    shares = Shares.constant({"small": 0.5, "web": 0.4, "code": 0.1})
    changed = redistributed(shares, {"small": 10})
    assert [share_at(changed, "small", sequence) for sequence in (19, 21)] == [0.5, 0]
    assert share_at(changed, "web", 25) == pytest.approx(0.8)
    assert SourceSchedule(changed).counts(1000)["small"] == 10


def test_in_a_ramp_the_other_shares_stay_linear_up_to_their_last_proportions() -> None:
    first, last = {"small": 0.5, "web": 0.5, "chat": 0.0}, {"small": 0.2, "web": 0.4, "chat": 0.4}
    changed = redistributed(Shares([ShareSegment(1000, first, last)]), {"small": 60})
    turn = int(last_sequence_within(Shares([ShareSegment(1000, first, last)]), "small", 60))
    assert share_at(changed, "small", turn + 1) == 0
    assert share_at(changed, "web", 999) == pytest.approx(0.5, abs=1e-3)
    assert share_at(changed, "chat", (turn + 1000) // 2) == pytest.approx(
        (share_at(changed, "chat", turn) + share_at(changed, "chat", 999)) / 2, abs=1e-3
    )


def test_one_exhausted_source_after_another_until_none_is_left() -> None:
    shares = Shares.constant({"a": 0.5, "b": 0.3, "c": 0.2})
    changed = redistributed(shares, {"a": 10, "b": 20})
    assert [share_at(changed, "c", sequence) for sequence in (5, 30, 400)] == pytest.approx([0.2, 0.4, 1.0])
    ends = redistributed(shares, {"a": 10, "b": 20, "c": 30})
    assert min(last_sequence_within(ends, *cap) for cap in {"a": 10, "b": 20, "c": 30}.items()) == 60


def mixture_of(when_exhausted: str, phases: list[PhaseSection]) -> MixtureSection:
    web = SourceSection(token_share=0.9, files=["web.txt"])
    small = SourceSection(token_share=0.1, files=["s.txt"], max_epochs=1, when_exhausted=when_exhausted)
    return MixtureSection("mine", sources={"web": web, "small": small}, phases=phases)


LATE = [PhaseSection(0.5), PhaseSection(1.0, token_shares={"small": 0.5, "web": 0.5}, ramp=True)]
EARLY = [PhaseSection(0.5, token_shares={"small": 0.5, "web": 0.5}), PhaseSection(1.0)]


@pytest.mark.parametrize("phases", [[], LATE, EARLY])
@pytest.mark.parametrize("capacity", [7, 100, 1000])
def test_the_budget_that_a_refusal_names_fits_and_one_step_more_does_not(
    phases: list[PhaseSection], capacity: int
) -> None:
    mixture, global_batch_size = mixture_of("stop", phases), 8
    steps = fitting_steps(mixture, 100_000, global_batch_size, {"small": capacity})
    fitting = Shares.of(mixture, steps * global_batch_size)
    assert SourceSchedule(fitting).counts(steps * global_batch_size)["small"] <= capacity
    assert first_exceeded(mixture, steps * global_batch_size, {"small": capacity}) is None
    assert first_exceeded(mixture, (steps + 1) * global_batch_size, {"small": capacity}) == "small"
    assert fitting_steps(mixture, steps - 1, global_batch_size, {"small": capacity}) == steps - 1


def test_redistributed_shares_may_exhaust_other_sources() -> None:
    mixture = mixture_of("redistribute", [])
    mixture.sources["web"].max_epochs = 1
    assert first_exceeded(mixture, 1000, {"small": 10, "web": 995}) is None
    assert first_exceeded(mixture, 1000, {"small": 10, "web": 980}) == "web"
    assert fitting_steps(mixture, 1000, 1, {"small": 10, "web": 980}) in (990, 991)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=2, max_size=6), capacities_of_12)
def test_no_source_gives_more_than_is_read_ahead(parts: list[int], sizes: list[int | None]) -> None:
    sources = {
        name: SourceSection(
            token_share=share,
            max_epochs=1 if size is not None else None,
            when_exhausted="stop" if size is None else "redistribute",
        )
        for (name, share), size in zip(weighted(parts).items(), sizes, strict=False)
    }
    mixture, num_sequences = MixtureSection("mine", sources=sources), 200
    capacities = {name: size for name, size in zip(sources, sizes, strict=False) if size is not None}
    counts = SourceSchedule(capped_shares(mixture, num_sequences, capacities)).counts(num_sequences)
    most = most_sequences(mixture, num_sequences)
    assert all(count <= most[name] for name, count in counts.items())


@pytest.fixture
def recipe(mixture: MixtureSection) -> Recipe:
    recipe = compose_recipe("quickstart", ["training.global_batch_size=4", "training.micro_batch_size=2"])
    recipe.mixture, recipe.training.sequence_length = mixture, 64
    recipe.training.budget_tokens = 400 * 4 * 64
    return recipe


def test_a_run_that_would_exceed_a_cap_is_refused_and_the_budget_it_names_is_not(
    recipe: Recipe, tokenized: dict[str, TokenizedSource]
) -> None:
    chats = recipe.mixture.sources["chats"]
    chats.max_epochs = 2
    with pytest.raises(MixtureError, match=r"'chats' would be seen .* max_epochs=2") as caught:
        shares_of(recipe, tokenized)
    budget = int(re.findall(r"budget_tokens=(\d+)", str(caught.value))[0])
    recipe.training.budget_tokens = budget
    shares_of(recipe, tokenized)
    recipe.training.budget_tokens = budget + recipe.step_tokens
    with pytest.raises(MixtureError):
        shares_of(recipe, tokenized)


def test_the_other_sources_replace_an_exhausted_one_until_they_are_exhausted_too(
    recipe: Recipe, tokenized: dict[str, TokenizedSource]
) -> None:
    chats, stories = recipe.mixture.sources["chats"], recipe.mixture.sources["stories"]
    chats.max_epochs, chats.when_exhausted = 2, "redistribute"
    num_sequences = recipe.num_steps * recipe.training.global_batch_size
    counts = SourceSchedule(shares_of(recipe, tokenized)).counts(num_sequences)
    assert counts["chats"] == 2 * TrainingStream(tokenized["chats"], 64, 0).num_sequences
    assert counts["stories"] == num_sequences - counts["chats"]
    stories.max_epochs, stories.when_exhausted = 2, "redistribute"
    with pytest.raises(MixtureError, match="no other source is left to take its share"):
        shares_of(recipe, tokenized)
