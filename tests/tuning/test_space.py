"""Parsing of `--over`, and points that fill its bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.errors import RecipeError
from sparsify.recipe.mixture import MixtureSection, PhaseSection
from sparsify.recipe.source import SourceSection
from sparsify.tuning.space import OTHERS, Part, Space, parse_space

INSTRUCTION_SHARE = "mixture.instruction_token_share"


def mixture(instruction: float = 0.2, knob: float | None = None) -> MixtureSection:
    sources = {
        "web": SourceSection(token_share=0.5 - instruction / 2, stdlib="prose"),
        "code": SourceSection(token_share=0.3 - instruction / 2, stdlib="code"),
        "books": SourceSection(token_share=0.2, stdlib="prose"),
        "chat": SourceSection(token_share=instruction, group="instruction", stdlib="questions"),
    }
    return MixtureSection(name="own", sources=sources, instruction_token_share=knob)


def bounds(space: Space) -> dict[str, tuple[float, float]]:
    return {part.name: (part.low, part.high) for part in space.parts}


def test_the_instruction_share_moves_both_groups_and_keeps_their_proportions() -> None:
    space = parse_space([f"{INSTRUCTION_SHARE}=0:0.4"], mixture())
    assert bounds(space) == {"instruction": (0, 0.4), "pretraining": (0.6, 1)}
    assert space.num_free == 1
    shares = space.source_shares(np.array([0.4, 0.6]))
    assert shares == {"web": 0.3, "code": 0.15, "books": 0.15, "chat": 0.4}


def test_all_shares_with_a_bound_on_one() -> None:
    space = parse_space(["token_shares", "code=0.2:0.6"], mixture())
    assert bounds(space)["code"] == (0.2, 0.6)
    assert bounds(space)["web"] == (0, 0.8)  # the rest, given the bound on code
    assert space.num_free == 3
    assert space.default.tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2])


def test_unnamed_sources_share_the_remainder() -> None:
    space = parse_space(["code=0.1:0.5"], mixture())
    assert [part.name for part in space.parts] == ["code", OTHERS]
    shares = space.source_shares(np.array([0.5, 0.5]))
    assert shares == {"web": 0.25, "books": 0.125, "chat": 0.125, "code": 0.5}


def test_the_default_is_the_mixture_with_its_instruction_share_applied() -> None:
    space = parse_space(["code=0:1"], mixture(knob=0.0))
    assert space.default.tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize(
    ("over", "message"),
    [
        (["codes=0:1"], "Did you mean 'code'"),
        (["code"], "Allowed: mixture.instruction_token_share=LOW:HIGH"),
        (["code=0.5"], "SOURCE=LOW:HIGH"),
        (["code=0.6:0.2"], "0 <= LOW < HIGH <= 1"),
        (["code=0:1.5"], "0 <= LOW < HIGH <= 1"),
        (["code=-1:0.5"], "0 <= LOW < HIGH <= 1"),
        (["code=1e:2"], "0 <= LOW < HIGH <= 1"),
        ([INSTRUCTION_SHARE], f"{INSTRUCTION_SHARE}=0:0.4"),
        (["token_shares=0:1"], "--over token_shares --over SOURCE=0.2:0.8"),
        (["code=0:1", "code=0:0.5"], "twice"),
        ([f"{INSTRUCTION_SHARE}=0:0.4", "code=0:1"], "Vary either"),
        (["code=0.7:0.9", "web=0.6:0.9"], "lower bounds sum to 1.3"),
        (["token_shares", *(f"{name}=0:0.2" for name in mixture().sources)], "sum to 0.8"),
        (["code=0.4:0.9", "web=0.6:0.9"], "leaves no share to vary"),
    ],
)
def test_an_invalid_over_is_refused_with_the_next_step(over: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse_space(over, mixture())
    assert message in str(error.value)


def test_the_instruction_share_needs_both_groups() -> None:
    with pytest.raises(RecipeError, match="no instruction source"):
        parse_space([f"{INSTRUCTION_SHARE}=0:0.4"], mixture(instruction=0.0))


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    """A mixture that exists, and bounds around it."""
    count = draw(st.integers(2, 6))
    raw = np.array(draw(st.lists(st.floats(0.05, 1), min_size=count, max_size=count)))
    inside = raw / raw.sum()
    margins = draw(st.lists(st.tuples(st.floats(0, 1), st.floats(0.05, 1)), min_size=count, max_size=count))
    parts = tuple(
        Part(f"s{i}", share * low, share + (1 - share) * high, {f"s{i}": 1.0})
        for i, (share, (low, high)) in enumerate(zip(inside, margins, strict=True))
    )
    return Space(parts, inside)


@settings(max_examples=60, deadline=None)
@given(spaces(), st.integers(0, 2**31))
def test_points_are_within_the_bounds_and_sum_to_one(space: Space, seed: int) -> None:
    points = space.spread(32, seed)
    assert np.allclose(points.sum(axis=1), 1)
    for column, part in zip(points.T, space.parts, strict=True):
        assert column.min() >= part.low - 1e-9
        assert column.max() <= part.high + 1e-9
    for shares in map(space.source_shares, points):
        assert round(sum(shares.values()), 9) == 1
        assert all(share == round(share, 4) >= 0 for share in shares.values())
    assert np.array_equal(points, space.spread(32, seed))
    assert np.array_equal(points[:9], space.spread(9, seed)), "trials can be added later"


def test_points_without_bounds_fill_the_simplex_evenly() -> None:
    parts = tuple(Part(name, 0, 1, {name: 1.0}) for name in "abcd")
    points = Space(parts, np.full(4, 0.25)).spread(512, 1)
    assert points.mean(axis=0) == pytest.approx([0.25] * 4, abs=0.02)
    # Of a uniform simplex of four shares, each share is above one half in 1/8 of the volume.
    assert (points > 0.5).mean(axis=0) == pytest.approx([1 / 8] * 4, abs=0.03)


def test_a_few_points_are_spread_out() -> None:
    """Eight Sobol points of one share: one in each eighth of the range; random ones would leave gaps."""
    space = parse_space([f"{INSTRUCTION_SHARE}=0:0.4"], mixture())
    eighths = np.floor(space.spread(8, 3)[:, 0] / 0.05).astype(int)
    assert sorted(eighths.tolist()) == list(range(8))


def test_a_mixture_with_phases_is_refused() -> None:
    phased = mixture()
    phased.phases = [PhaseSection(until_budget_share=1.0, instruction_token_share=0.1)]
    with pytest.raises(RecipeError, match=r"has phases(.|\n)*mixture.phases=\[\]"):
        parse_space(["token_shares"], phased)
