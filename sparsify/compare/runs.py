"""Puts runs side by side: which numbers there are, and which of them may be compared.

Finds the dense baseline of a run, and what the run's zeros cost against it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sparsify.compare.caveats import notes
from sparsify.compare.run_summary import Variant, read_variant
from sparsify.compare.schema import (
    Baseline,
    BaselineState,
    ComparedRun,
    Comparison,
    Setting,
    SourceOfRun,
)
from sparsify.compare.settings import differing_settings, short_names, swept_setting
from sparsify.errors import RunError
from sparsify.runs.history import curve_records
from sparsify.runs.run_folder import RunFolder


def find_baseline(
    variant: Variant, compared: Mapping[str, Variant]
) -> tuple[Baseline | None, BaselineState]:
    """The dense baseline of a run: the one in its own folder, else one among the compared runs.

    Args:
        variant: The run.
        compared: All runs of the comparison, by name.

    Returns:
        The baseline, and how it is about it.
    """
    if variant.is_dense:
        return None, "is dense"
    own, state = _own_baseline(variant)
    candidates = {"its own": own} if own is not None else compared
    for name, candidate in candidates.items():
        if candidate.is_control_of(variant):
            baseline = _gap(variant, candidate, name)
            if baseline is not None:
                return baseline, "compared"
            state = "not measured yet"
    return None, state


def _own_baseline(variant: Variant) -> tuple[Variant | None, BaselineState]:
    folder = variant.run.baseline
    if not folder.recipe.is_file() or not folder.load_recipe().is_dense:
        return None, "no baseline"
    if not curve_records(folder):
        return None, "not measured yet"
    return read_variant(folder.path), "no baseline"


def _gap(variant: Variant, baseline: Variant, name: str) -> Baseline | None:
    """Both at the newest number of tokens that both were measured at; None if there is none."""
    of_baseline = {point.tokens: point for point in baseline.points}
    common = [point for point in variant.points if point.tokens in of_baseline]
    if not common:
        return None
    newest = common[-1]
    there = of_baseline[newest.tokens]
    return Baseline(
        name=name,
        path=str(baseline.run.path),
        tokens=newest.tokens,
        loss=there.loss,
        gap=newest.loss - there.loss,
        source_gaps={
            source: loss - there.sources[source] for source, loss in newest.sources.items()
        },
        points=baseline.points,
    )


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads runs and puts them side by side.

    Args:
        paths: Run folders, in the order of the table. One alone is compared with its baseline.

    Raises:
        RunError: If there is nothing to compare, a run is given twice, or one cannot be read.
        RecipeError: If a run's recipe is not one of this version.
    """
    variants = [read_variant(path) for path in _with_baseline(paths)]
    names = short_names([variant.run.path for variant in variants])
    named = dict(zip(names, variants, strict=True))
    settings = differing_settings(variants)
    agreement = _agreement(named)
    comparison = Comparison(
        runs=[
            _compared_run(name, variant, own, find_baseline(variant, named), agreement)
            for (name, variant), own in zip(named.items(), settings, strict=True)
        ],
        settings=list(settings[0]),
        sources=list(agreement.sources),
        swept_setting=_swept(variants),
        notes=[],
    )
    comparison.notes = notes(
        comparison, {name: variant.sequences() for name, variant in named.items()}
    )
    return comparison


@dataclass(frozen=True)
class _Agreement:
    """Names of the runs whose numbers may be compared with each other."""

    sources: dict[str, set[str]]
    """For the loss of each source."""
    zeros: set[str]
    losses: set[str]


def _agreement(variants: Mapping[str, Variant]) -> _Agreement:
    sequences = {name: variant.sequences() for name, variant in variants.items()}
    shares = {name: variant.shares() for name, variant in variants.items()}
    sources = dict.fromkeys(
        source
        for variant in variants.values()
        for source in (*variant.lock.sources, *variant.points[-1].sources)
    )
    return _Agreement(
        sources={
            source: agreeing(
                {name: own[source] for name, own in sequences.items() if source in own}
            )
            for source in sources
        },
        zeros=agreeing({name: frozenset(own.items()) for name, own in sequences.items()}),
        # A validation loss is a mean over sequences with weights: it can be compared where both are the same.
        losses=agreeing(
            {
                name: frozenset((source, shares[name][source], of) for source, of in own.items())
                for name, own in sequences.items()
            }
        ),
    )


def _compared_run(
    name: str,
    variant: Variant,
    settings: dict[str, Setting],
    baseline: tuple[Baseline | None, BaselineState],
    agreement: _Agreement,
) -> ComparedRun:
    newest = variant.points[-1]
    sources = {
        source: _source_of_run(variant, source, comparable=name in names)
        for source, names in agreement.sources.items()
    }
    return ComparedRun(
        name=name,
        path=str(variant.run.path),
        settings=settings,
        ffn_activation=variant.recipe.activation.ffn_activation,
        is_dense=variant.is_dense,
        budget_tokens=variant.budget_tokens,
        seen_tokens=variant.seen_tokens,
        loss=newest.loss,
        loss_comparable=name in agreement.losses,
        mean_loss=_mean_loss(sources),
        zeros=newest.zeros,
        zeros_comparable=name in agreement.zeros,
        tokens_per_second=variant.tokens_per_second,
        sources=sources,
        baseline=baseline[0],
        baseline_state=baseline[1],
        points=variant.points,
    )


def _with_baseline(paths: Sequence[Path]) -> list[Path]:
    """The paths, once each is known to be there once; one run alone brings its baseline."""
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
    read_variant(path)
    baseline = RunFolder(path).baseline
    if not baseline.recipe.is_file():
        raise RunError(
            f"{path} is one run, and it has no baseline to be compared with.",
            allowed="Two runs or more, or one that was trained with baseline.ffn_activation=swiglu.",
            next_step="Give another run beside it: sparsify compare RUN RUN …",
        )
    return [path, baseline.path]


def agreeing(keys: Mapping[str, Hashable]) -> set[str]:
    """Which of the runs may be compared with each other: those that share the key that most have; all, if all do.

    Where no two runs share one, there are none.
    """
    counts = Counter(keys.values())
    if len(counts) <= 1:
        return set(keys)
    key, count = counts.most_common(1)[0]
    return {run for run, own in keys.items() if own == key} if count > 1 else set()


def _source_of_run(variant: Variant, source: str, *, comparable: bool) -> SourceOfRun:
    locked = variant.lock.sources.get(source)
    return SourceOfRun(
        token_share=locked.token_share if locked else 0.0,
        planned_tokens=locked.planned_tokens if locked else 0,
        loss=variant.points[-1].sources.get(source),
        comparable=comparable,
    )


def _mean_loss(sources: Mapping[str, SourceOfRun]) -> float | None:
    losses = [source.loss for source in sources.values() if source.comparable]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if len(known) == len(sources) else None


def _swept(variants: Sequence[Variant]) -> str | None:
    """The setting that a series of runs goes through; the dense baselines among them are no part of the series."""
    series = [
        variant
        for variant in variants
        if not any(variant.is_control_of(other) for other in variants)
    ]
    return swept_setting(differing_settings(series)) if len(series) > 1 else None
