"""Puts runs side by side: which numbers there are, and which of them may be compared.

Finds the dense control of a run, and what the run's zeros cost against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sparsify.compare.caveats import notes
from sparsify.compare.run_summary import Arm, read_arm
from sparsify.compare.schema import (
    ComparedRun,
    Comparison,
    Control,
    ControlState,
    Setting,
    SourceOfRun,
)
from sparsify.compare.settings import differing_settings, short_names, swept_setting
from sparsify.errors import RunError
from sparsify.runs.history import curve_records
from sparsify.runs.run_folder import RunFolder


def find_control(arm: Arm, compared: Mapping[str, Arm]) -> tuple[Control | None, ControlState]:
    """The dense control of a run: the one in its own folder, else one among the compared runs.

    Args:
        arm: The run.
        compared: All runs of the comparison, by name.

    Returns:
        The control, and how it is about it.
    """
    if arm.is_dense:
        return None, "is dense"
    own, state = _own_control(arm)
    candidates = {"its own": own} if own is not None else compared
    for name, candidate in candidates.items():
        if candidate.is_control_of(arm):
            control = _gap(arm, candidate, name)
            if control is not None:
                return control, "compared"
            state = "not measured yet"
    return None, state


def _own_control(arm: Arm) -> tuple[Arm | None, ControlState]:
    folder = arm.run.control
    if not folder.recipe.is_file() or folder.load_recipe().activation.ffn_activation != "swiglu":
        return None, "no control"
    if not curve_records(folder):
        return None, "not measured yet"
    return read_arm(folder.path), "no control"


def _gap(arm: Arm, control: Arm, name: str) -> Control | None:
    """Both at the newest number of tokens that both were measured at; None if there is none."""
    of_control = {point.tokens: point for point in control.points}
    common = [point for point in arm.points if point.tokens in of_control]
    if not common:
        return None
    newest = common[-1]
    there = of_control[newest.tokens]
    return Control(
        name=name,
        path=str(control.run.path),
        tokens=newest.tokens,
        loss=there.loss,
        gap=newest.loss - there.loss,
        source_gaps={
            source: loss - there.sources[source] for source, loss in newest.sources.items()
        },
        points=control.points,
    )


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and puts them side by side.

    Args:
        paths: Run folders, in the order of the table. One alone is compared with its control.

    Raises:
        RunError: If there is nothing to compare, a run is given twice, or one cannot be read.
        RecipeError: If a run's recipe is not one of this version.
    """
    arms = [read_arm(path) for path in _with_control(paths)]
    names = short_names([arm.run.path for arm in arms])
    named = dict(zip(names, arms, strict=True))
    settings = differing_settings(arms)
    agreement = _agreement(named)
    comparison = Comparison(
        runs=[
            _compared_run(name, arm, own, find_control(arm, named), agreement)
            for (name, arm), own in zip(named.items(), settings, strict=True)
        ],
        settings=list(settings[0]),
        sources=list(agreement.sources),
        swept_setting=_swept(arms),
        notes=[],
    )
    comparison.notes = notes(comparison, {name: arm.windows() for name, arm in named.items()})
    return comparison


@dataclass(frozen=True)
class _Agreement:
    """Names of the runs whose numbers may be compared with each other."""

    sources: dict[str, set[str]]
    """For the loss of each source."""
    zeros: set[str]
    losses: set[str]


def _agreement(arms: Mapping[str, Arm]) -> _Agreement:
    windows = {name: arm.windows() for name, arm in arms.items()}
    shares = {name: arm.shares() for name, arm in arms.items()}
    sources = dict.fromkeys(
        source for arm in arms.values() for source in (*arm.lock.sources, *arm.points[-1].sources)
    )
    return _Agreement(
        sources={
            source: agreeing({name: own[source] for name, own in windows.items() if source in own})
            for source in sources
        },
        zeros=agreeing({name: frozenset(own.items()) for name, own in windows.items()}),
        # A validation loss is a mean over windows with weights: it can be compared where both are the same.
        losses=agreeing(
            {
                name: frozenset((source, shares[name][source], of) for source, of in own.items())
                for name, own in windows.items()
            }
        ),
    )


def _compared_run(
    name: str,
    arm: Arm,
    settings: dict[str, Setting],
    control: tuple[Control | None, ControlState],
    agreement: _Agreement,
) -> ComparedRun:
    newest = arm.points[-1]
    sources = {
        source: _source_of_run(arm, source, comparable=name in names)
        for source, names in agreement.sources.items()
    }
    return ComparedRun(
        name=name,
        path=str(arm.run.path),
        settings=settings,
        ffn_activation=arm.recipe.activation.ffn_activation,
        budget_tokens=arm.budget_tokens,
        seen_tokens=arm.seen_tokens,
        loss=newest.loss,
        loss_comparable=name in agreement.losses,
        mean_loss=_mean_loss(sources),
        zeros=newest.zeros,
        zeros_comparable=name in agreement.zeros,
        tokens_per_second=arm.tokens_per_second,
        sources=sources,
        control=control[0],
        control_state=control[1],
        points=arm.points,
    )


def _with_control(paths: Sequence[Path]) -> list[Path]:
    """The paths, once each is known to be there once; one run alone brings its control."""
    paths = [path.expanduser() for path in paths]
    counts = Counter(path.resolve() for path in paths)
    twice = next((path for path in paths if counts[path.resolve()] > 1), None)
    if twice is not None:
        raise RunError(
            f"{twice} is given twice.",
            next_step="Give every run folder once, in the order of the table.",
        )
    if len(paths) > 1:
        return list(paths)
    (path,) = paths
    read_arm(path)
    control = RunFolder(path).control
    if not control.recipe.is_file():
        raise RunError(
            f"{path} is one run, and it has no control to be compared with.",
            allowed="Two runs or more, or one that was trained with control.ffn_activation=swiglu.",
            next_step="Give another run beside it: sparsify compare RUN RUN …",
        )
    return [path, control.path]


def agreeing(keys: Mapping[str, Hashable]) -> set[str]:
    """Which of the runs may be compared with each other: those that share the key that most have; all, if all do.

    Where no two runs share one, there are none.
    """
    counts = Counter(keys.values())
    if len(counts) <= 1:
        return set(keys)
    key, count = counts.most_common(1)[0]
    return {run for run, own in keys.items() if own == key} if count > 1 else set()


def _source_of_run(arm: Arm, source: str, *, comparable: bool) -> SourceOfRun:
    locked = arm.lock.sources.get(source)
    return SourceOfRun(
        token_share=locked.token_share if locked else 0.0,
        planned_tokens=locked.planned_tokens if locked else 0,
        loss=arm.points[-1].sources.get(source),
        comparable=comparable,
    )


def _mean_loss(sources: Mapping[str, SourceOfRun]) -> float | None:
    losses = [source.loss for source in sources.values() if source.comparable]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if len(known) == len(sources) else None


def _swept(arms: Sequence[Arm]) -> str | None:
    """The setting that a series of runs goes through; the dense controls among them are no part of the series."""
    series = [arm for arm in arms if not any(arm.is_control_of(other) for other in arms)]
    return swept_setting(differing_settings(series)) if len(series) > 1 else None
