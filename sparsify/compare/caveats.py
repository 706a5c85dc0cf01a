"""Caveats below the tables of a comparison: which numbers are not comparable, and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from sparsify.compare.run_summary import Sequences
from sparsify.compare.schema import Comparison

MARK = "†"
"""Follows a number that is not comparable with the others in its column."""


def notes(comparison: Comparison, sequences: Mapping[str, Mapping[str, Sequences]]) -> list[str]:
    """The caveats of a comparison; those that explain marks come first."""
    return [
        *_other_sequences(comparison, sequences),
        *_weights(comparison),
        *_zeros(comparison),
        *_unmeasured(comparison),
        *_unfinished(comparison),
        *_baselines(comparison),
    ]


def _other_sequences(comparison: Comparison, sequences: Mapping[str, Mapping[str, Sequences]]) -> Iterator[str]:
    """One caveat for each run and difference, with all sources that it concerns."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for source in comparison.sources:
        measured = {run: of_run[source] for run, of_run in sequences.items() if source in of_run}
        if len(set(measured.values())) <= 1:
            continue
        usual = Counter(measured.values()).most_common(1)[0][0]
        example = next(run for run, own in measured.items() if own == usual)
        for run, own in measured.items():
            if own != usual:
                found.setdefault((run, example, _difference(own, usual)), []).append(source)
    for (run, example, difference), sources in found.items():
        yield (
            f"{MARK} {run}: {_list(sources)} {'was' if len(sources) == 1 else 'were'} not evaluated on the "
            f"sequences of {example}: {difference}. These losses are on different text and cannot be compared."
        )


def _difference(own: Sequences, usual: Sequences) -> str:
    parts = []
    if own.tokenizer_fingerprint != usual.tokenizer_fingerprint:
        parts.append("a different tokenizer")
    elif own.fingerprint != usual.fingerprint:
        parts.append(
            f"different text, columns or held-out split (fingerprint {own.fingerprint}, not {usual.fingerprint})"
        )
    if own.sequence_length != usual.sequence_length:
        parts.append(f"sequences of {own.sequence_length:,} tokens, not {usual.sequence_length:,}")
    if own.num_sequences != usual.num_sequences:
        parts.append(f"{own.num_sequences:,} sequences, not {usual.num_sequences:,}")
    return "; ".join(parts)


def _weights(comparison: Comparison) -> Iterator[str]:
    if comparison.losses_comparable:
        return
    yield (
        f"{MARK} A run's validation loss is the mean of its sources' losses, weighted by its own token shares. Losses of "
        "runs with different shares, sources or sequences are not comparable: compare the sources' losses"
        + (", or their unweighted mean." if any(run.mean_loss is not None for run in comparison.runs) else ".")
    )


def _zeros(comparison: Comparison) -> Iterator[str]:
    if any(run.zeros and not run.zeros_comparable for run in comparison.runs):
        yield (
            f"{MARK} Exact zeros are counted over all sequences of a validation, and these runs were not evaluated on the "
            "same sequences: small differences between their zeros may come from the text."
        )


def _unmeasured(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs:
        without = [name for name, source in run.sources.items() if source.loss is None]
        unused = [name for name in without if not run.sources[name].planned_tokens]
        if unused:
            yield (
                f"{run.name} does not train on {_list(unused, 'or')}, so it was not evaluated there and has no unweighted mean."
            )


def _unfinished(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs:
        if not run.finished:
            yield (
                f"{run.name} is not finished: {run.seen_tokens:,} of {run.budget_tokens:,} tokens "
                f"({run.seen_tokens / run.budget_tokens:.0%}). Its losses and zeros are those at "
                f"{run.measured_tokens:,} tokens."
            )
    if len({run.measured_tokens for run in comparison.runs}) > 1:
        yield "The runs were evaluated after different numbers of training tokens; see the curves."


def _baselines(comparison: Comparison) -> Iterator[str]:
    for run in comparison.runs:
        if run.baseline is not None and run.baseline.tokens != run.measured_tokens:
            yield (
                f"{run.name}: the gap to its baseline is that at {run.baseline.tokens:,} tokens, the last point at which "
                "both were evaluated."
            )
    without = [run.name for run in comparison.runs if run.baseline_state == "no baseline"]
    if without:
        yield (
            f"No baseline for {_list(without)}: the cost of the zeros is unknown, since training on other data changes the "
            "loss of a dense model too. Train one with baseline.ffn_activation=swiglu."
        )


def _list(names: list[str], word: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {word} {names[-1]}"
