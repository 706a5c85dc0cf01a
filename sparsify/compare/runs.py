"""Compares runs: which of their numbers are comparable, and the gap of each run to its dense baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sparsify.compare.caveats import notes
from sparsify.compare.run_summary import RunSummary, read_run_summary
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
from sparsify.metadata import user_path
from sparsify.runs.history import curve_records
from sparsify.runs.run_folder import RunFolder


def find_baseline(summary: RunSummary, compared: Mapping[str, RunSummary]) -> tuple[Baseline | None, BaselineState]:
    """The dense baseline of a run: the one in its own folder, otherwise one of the compared runs."""
    if summary.is_dense:
        return None, "is dense"
    own, state = _own_baseline(summary)
    candidates = {"its own": own} if own is not None else compared
    for name, candidate in candidates.items():
        if candidate.is_baseline_of(summary):
            baseline = _gap(summary, candidate, name)
            if baseline is not None:
                return baseline, "compared"
            state = "not measured yet"
    return None, state


def _own_baseline(summary: RunSummary) -> tuple[RunSummary | None, BaselineState]:
    folder = summary.run.baseline
    if not folder.recipe.is_file() or not folder.is_dense:
        return None, "no baseline"
    if not curve_records(folder):
        return None, "not measured yet"
    return read_run_summary(folder.path), "no baseline"


def _gap(summary: RunSummary, baseline: RunSummary, name: str) -> Baseline | None:
    """The gap at the newest number of tokens at which both were evaluated; None if there is none."""
    of_baseline = {point.tokens: point for point in baseline.points}
    common = [point for point in summary.points if point.tokens in of_baseline]
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
        source_gaps={source: loss - there.sources[source] for source, loss in newest.sources.items()},
        points=baseline.points,
    )


def compare(paths: Sequence[Path]) -> Comparison:
    """Reads and compares runs.

    Raises:
        RunError: If there is nothing to compare, a run is given twice, or one cannot be read.
        RecipeError: If a run's recipe is not one of this version.
    """
    summaries = [read_run_summary(path) for path in _with_baseline(paths)]
    names = short_names([summary.run.path for summary in summaries])
    named = dict(zip(names, summaries, strict=True))
    settings = differing_settings(summaries)
    agreement = _agreement(named)
    comparison = Comparison(
        runs=[
            _compared_run(name, summary, own, find_baseline(summary, named), agreement)
            for (name, summary), own in zip(named.items(), settings, strict=True)
        ],
        settings=list(settings[0]),
        sources=list(agreement.sources),
        swept_setting=_swept(summaries),
        notes=[],
    )
    comparison.notes = notes(comparison, {name: summary.sequences() for name, summary in named.items()})
    return comparison


@dataclass(frozen=True)
class _Agreement:
    """Names of the runs whose numbers are comparable with each other."""

    sources: dict[str, set[str]]
    """By source, for the source's loss."""
    zeros: set[str]
    losses: set[str]


def _agreement(summaries: Mapping[str, RunSummary]) -> _Agreement:
    sequences = {name: summary.sequences() for name, summary in summaries.items()}
    shares = {name: summary.shares() for name, summary in summaries.items()}
    sources = dict.fromkeys(
        source for summary in summaries.values() for source in (*summary.lock.sources, *summary.points[-1].sources)
    )
    return _Agreement(
        sources={
            source: agreeing({name: own[source] for name, own in sequences.items() if source in own})
            for source in sources
        },
        zeros=agreeing({name: frozenset(own.items()) for name, own in sequences.items()}),
        # A validation loss is a weighted mean over sequences: comparable if both weights and sequences are the same.
        losses=agreeing(
            {
                name: frozenset((source, shares[name][source], of) for source, of in own.items())
                for name, own in sequences.items()
            }
        ),
    )


def _compared_run(
    name: str,
    summary: RunSummary,
    settings: dict[str, Setting],
    baseline: tuple[Baseline | None, BaselineState],
    agreement: _Agreement,
) -> ComparedRun:
    newest = summary.points[-1]
    sources = {
        source: _source_of_run(summary, source, comparable=name in names) for source, names in agreement.sources.items()
    }
    return ComparedRun(
        name=name,
        path=str(summary.run.path),
        settings=settings,
        ffn_activation=summary.recipe.activation.ffn_activation,
        is_dense=summary.is_dense,
        budget_tokens=summary.budget_tokens,
        seen_tokens=summary.seen_tokens,
        loss=newest.loss,
        loss_comparable=name in agreement.losses,
        train_loss=summary.train_loss,
        mean_loss=_mean_loss(sources),
        zeros=newest.zeros,
        zeros_comparable=name in agreement.zeros,
        weight_sparsity=summary.weight_sparsity,
        tokens_per_second=summary.tokens_per_second,
        sources=sources,
        baseline=baseline[0],
        baseline_state=baseline[1],
        points=summary.points,
    )


def _with_baseline(paths: Sequence[Path]) -> list[Path]:
    """The paths, checked for duplicates; the path of its baseline is added to a single run."""
    paths = [user_path(path) for path in paths]
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
    read_run_summary(path)
    baseline = RunFolder(path).baseline
    if not baseline.recipe.is_file():
        raise RunError(
            f"{path} is a single run without a baseline to compare it with.",
            allowed="Two or more runs, or one that was trained with baseline.ffn_activation=swiglu.",
            next_step="Give a second run: sparsify compare RUN RUN …",
        )
    return [path, baseline.path]


def agreeing(keys: Mapping[str, Hashable]) -> set[str]:
    """Names of the runs that have the most frequent key; none if every key occurs once."""
    counts = Counter(keys.values())
    if len(counts) <= 1:
        return set(keys)
    key, count = counts.most_common(1)[0]
    return {run for run, own in keys.items() if own == key} if count > 1 else set()


def _source_of_run(summary: RunSummary, source: str, *, comparable: bool) -> SourceOfRun:
    locked = summary.lock.sources.get(source)
    return SourceOfRun(
        token_share=locked.token_share if locked else 0.0,
        planned_tokens=locked.planned_tokens if locked else 0,
        loss=summary.points[-1].sources.get(source),
        comparable=comparable,
    )


def _mean_loss(sources: Mapping[str, SourceOfRun]) -> float | None:
    losses = [source.loss for source in sources.values() if source.comparable]
    known = [loss for loss in losses if loss is not None]
    return fmean(known) if len(known) == len(sources) else None


def _swept(summaries: Sequence[RunSummary]) -> str | None:
    """The one setting that differs between the runs, without the dense baselines."""
    series = [summary for summary in summaries if not any(summary.is_baseline_of(other) for other in summaries)]
    return swept_setting(differing_settings(series)) if len(series) > 1 else None
