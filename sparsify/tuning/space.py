"""The search space of `--over`: parts of a mixture, bounds of their shares, and points spread over them.

    mixture.instruction_token_share=LOW:HIGH   the instruction group against the pretraining group
    token_shares                               every source
    SOURCE=LOW:HIGH                            this source; with `token_shares`, it narrows this source's bounds;
                                               alone, the other sources share the rest in their proportions

All three have the same form: parts whose shares sum to 1, each part a group of sources in fixed proportions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.errors import RecipeError, nearest
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.mixture import MixtureSection

INSTRUCTION_SHARE = "mixture.instruction_token_share"
ALL_SOURCES = "token_shares"
OTHERS = "all others"
SHARE_DECIMALS = 4
SMALLEST_RANGE = 1e-9
RESIDUAL_DEGREES = 2
"""Trials in addition to one per coefficient of a linear model, to estimate the noise."""
GRAMMAR = f"Allowed: {INSTRUCTION_SHARE}=LOW:HIGH, {ALL_SOURCES}, or SOURCE=LOW:HIGH, with 0 <= LOW < HIGH <= 1."

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Part:
    """Sources that are varied together.

    Args:
        low: Lower bound of the share of all tokens.
        high: Upper bound of the share of all tokens.
        members: Share of each source within the part; they sum to 1.
    """

    name: str
    low: float
    high: float
    members: Mapping[str, float]


@dataclass(frozen=True)
class Space:
    """A bounded simplex: one share for each part, summing to 1.

    Args:
        parts: The parts, with bounds that can all be attained.
        default: The recipe's own shares of the parts; they may be outside the bounds. [P]
    """

    parts: tuple[Part, ...]
    default: FloatArray

    @property
    def num_free(self) -> int:
        """Degrees of freedom: the number of varying parts minus 1, because shares sum to 1."""
        return sum(part.high - part.low > SMALLEST_RANGE for part in self.parts) - 1

    @property
    def min_trials(self) -> int:
        """Trials that a linear model of the shares needs, including those to estimate its noise."""
        return 1 + self.num_free + RESIDUAL_DEGREES

    def source_shares(self, point: FloatArray) -> dict[str, float]:
        """Token share of each source at a point [P], rounded to SHARE_DECIMALS decimals, summing to 1."""
        exact = {
            name: share * inside
            for part, share in zip(self.parts, point, strict=True)
            for name, inside in part.members.items()
        }
        return _rounded(exact)

    def point_of(self, shares: Mapping[str, float]) -> FloatArray:
        """Share of each part, given the shares of the sources. [P]"""
        return np.array([sum(shares.get(name, 0.0) for name in part.members) for part in self.parts])

    def spread(self, num_points: int, seed: int) -> FloatArray:
        """Points that fill the space evenly: a scrambled Sobol sequence, mapped to the bounded simplex.

        The first n points do not depend on `num_points`, so that trials can be added later.

        Returns:
            [num_points, P]
        """
        engine = torch.quasirandom.SobolEngine(len(self.parts) - 1, scramble=True, seed=seed)
        return self._on_simplex(engine.draw(num_points, dtype=torch.float64).numpy())

    def _on_simplex(self, cube: FloatArray) -> FloatArray:
        """Stick breaking: uniform where no upper bound is active, and within the bounds everywhere.

        Args:
            cube: Uniform numbers. [n, P - 1]
        """
        low = np.array([part.low for part in self.parts])
        room = np.array([part.high for part in self.parts]) - low
        rest = np.full(len(cube), 1.0 - low.sum())  # still to be distributed above the lower bounds
        shares = np.empty((len(cube), len(self.parts)))
        for index in range(len(self.parts) - 1):
            later = len(self.parts) - 1 - index
            first = np.clip(rest - room[index + 1 :].sum(), 0.0, None)
            last = np.minimum(room[index], rest)
            scale = np.maximum(rest, SMALLEST_RANGE)
            # The first of `later` + 1 shares of a uniform simplex has the distribution 1 - (1 - x)^later.
            start, stop = ((1.0 - np.clip(x / scale, 0, 1)) ** later for x in (first, last))
            kept = start + cube[:, index] * (stop - start)
            given = np.clip(scale * (1.0 - kept ** (1.0 / later)), first, last)
            shares[:, index] = low[index] + given
            rest = rest - given
        shares[:, -1] = low[-1] + rest
        return shares


def parse_space(over: Sequence[str], mixture: MixtureSection) -> Space:
    """Parses the values of `--over`, `NAME` or `NAME=LOW:HIGH` each. Raises RecipeError if one is invalid, they
    contradict each other, or nothing remains to vary.
    """
    if mixture.phases:
        raise RecipeError(
            f"Mixture {mixture.name!r} has phases; tuning varies shares that are constant over a run.",
            next_step="Set mixture.phases=[] to tune the sources' own shares.",
        )
    ranges: dict[str, tuple[float, float] | None] = {}
    for item in over:
        name, bounds = _read(item)
        if name in ranges:
            raise RecipeError(f"--over names {name} twice.", next_step="Name it once.")
        ranges[name] = bounds
    read_parts = _groups if INSTRUCTION_SHARE in ranges else _sources
    parts = read_parts(ranges, mixture)
    space = Space(tuple(_reachable(parts)), np.zeros(len(parts)))
    if space.num_free < 1:
        raise RecipeError(
            f"--over {' '.join(over)} leaves no share to vary: "
            + ", ".join(f"{part.name} is {part.low:g}" for part in space.parts)
            + ".",
            next_step="Widen the bounds, or vary more sources.",
        )
    return replace(space, default=space.point_of(token_shares(mixture)))


def _read(item: str) -> tuple[str, tuple[float, float] | None]:
    name, given, text = item.partition("=")
    if name == ALL_SOURCES and not given:
        return name, None
    match = re.fullmatch(r"\s*([\d.eE+-]+)\s*:\s*([\d.eE+-]+)\s*", text)
    try:
        low, high = (float(number) for number in match.groups()) if match else (1.0, 0.0)
    except ValueError:
        low, high = 1.0, 0.0
    if name == ALL_SOURCES or not 0 <= low < high <= 1:
        example = f"--over {ALL_SOURCES} --over SOURCE=0.2:0.8" if name == ALL_SOURCES else f"{name}=0:0.4"
        raise RecipeError(
            f"--over {item!r} is not a valid range.",
            allowed=GRAMMAR,
            next_step=f"For example: {example}",
        )
    return name, (low, high)


def _groups(ranges: Mapping[str, tuple[float, float] | None], mixture: MixtureSection) -> list[Part]:
    if len(ranges) > 1:
        others = ", ".join(name for name in ranges if name != INSTRUCTION_SHARE)
        raise RecipeError(
            f"--over varies {INSTRUCTION_SHARE} and {others} at once.",
            allowed=f"Sources keep their proportions within both groups while {INSTRUCTION_SHARE} varies.",
            next_step=f"Vary either {INSTRUCTION_SHARE}, or the shares of sources.",
        )
    bounds = ranges[INSTRUCTION_SHARE]
    assert bounds is not None
    low, high = bounds
    groups = {"instruction": (low, high), "pretraining": (1 - high, 1 - low)}
    parts = []
    for group, (least, most) in groups.items():
        stated = {name: source.token_share for name, source in mixture.sources.items() if source.group == group}
        if not sum(stated.values()):
            raise RecipeError(
                f"--over varies {INSTRUCTION_SHARE}, but mixture {mixture.name!r} has no {group} source with a share.",
                next_step=f"Add a source with group: {group}, or use --over {ALL_SOURCES}.",
            )
        parts.append(Part(group, least, most, _proportions(stated)))
    return parts


def _sources(ranges: Mapping[str, tuple[float, float] | None], mixture: MixtureSection) -> list[Part]:
    for name in ranges:
        if name != ALL_SOURCES and name not in mixture.sources:
            known = [INSTRUCTION_SHARE, ALL_SOURCES, *mixture.sources]
            raise RecipeError(
                f"--over names {name!r}, which is not a source of mixture {mixture.name!r}.",
                allowed=f"{nearest(name, known)}Sources: {', '.join(mixture.sources)}. {GRAMMAR}",
            )
    varied = list(mixture.sources) if ALL_SOURCES in ranges else list(ranges)
    parts = [Part(name, *(ranges.get(name) or (0.0, 1.0)), {name: 1.0}) for name in varied]
    left = {name: share for name, share in token_shares(mixture).items() if name not in varied}
    if left:
        parts.append(Part(next(iter(left)) if len(left) == 1 else OTHERS, 0, 1, _proportions(left)))
    return parts


def _proportions(stated: Mapping[str, float]) -> dict[str, float]:
    total = sum(stated.values())
    return {name: share / total for name, share in stated.items()}


def _reachable(parts: Sequence[Part]) -> list[Part]:
    """The parts with tightened bounds: those that each part can attain, given the bounds of the others."""
    lows, highs = sum(part.low for part in parts), sum(part.high for part in parts)
    if lows > 1 + SMALLEST_RANGE or highs < 1 - SMALLEST_RANGE:
        side, total = ("lower", lows) if lows > 1 else ("upper", highs)
        raise RecipeError(
            f"No mixture satisfies the bounds of --over: the {side} bounds sum to {total:g} ("
            + ", ".join(f"{part.name} {part.low:g}:{part.high:g}" for part in parts)
            + ").",
            allowed="Shares sum to 1: lower bounds to at most 1, upper bounds to at least 1.",
            next_step=f"{'Lower' if lows > 1 else 'Raise'} some of them.",
        )
    return [
        replace(
            part,
            low=round(max(part.low, 1 - (highs - part.high)), 12),
            high=round(min(part.high, 1 - (lows - part.low)), 12),
        )
        for part in parts
    ]


def _rounded(exact: Mapping[str, float]) -> dict[str, float]:
    """Rounds by largest remainders: the closest shares with SHARE_DECIMALS decimals that sum to 1."""
    units = 10**SHARE_DECIMALS
    scaled = {name: share * units for name, share in exact.items()}
    whole = {name: int(share) for name, share in scaled.items()}
    by_remainder = sorted(exact, key=lambda name: whole[name] - scaled[name])
    for name in by_remainder[: units - sum(whole.values())]:
        whole[name] += 1
    return {name: count / units for name, count in whole.items()}
