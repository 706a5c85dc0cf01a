"""The result of `sparsify bench mixture`, and its tables."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.reporting.tables import Table


class Delivered(BaseModel):
    """What a run delivered, counted over all its sequences."""

    token_shares: dict[str, float]
    """Share of all sequence positions, by source."""
    largest_deviation_sequences: float
    """Largest distance of any source from its requested share times n, after any number n of sequences."""
    text_positions: float
    """Share of sequence positions with text; the rest is padding."""
    cut_documents: int
    """Documents shorter than a sequence that are split over several sequences."""


class Resumed(BaseModel):
    """A run stopped half way and resumed, compared with the same run without interruption."""

    documents: int
    """Documents of the uninterrupted run; in our pipeline, a document longer than a sequence counts once per piece."""
    lost: int
    """Documents that the resumed run drew less often than the uninterrupted one."""
    repeated: int
    """Documents that the resumed run repeated but the uninterrupted one did not."""


class Side(BaseModel):
    """One side of the comparison. Times and rates are medians."""

    delivered: Delivered
    resumed: Resumed
    text_tokens_per_second: float
    """From text to sequences."""
    cached_tokens_per_second: float | None
    """From the token cache of an earlier run; None without a cache."""
    late_resume_seconds: float
    """Time to the first sequence after a restart late in the run, from saved state."""
    late_skip_seconds: float | None
    """The same without saved state, by skipping; None if nothing has to be skipped."""
    peak_memory_bytes: int
    """Peak memory of a process that goes from text to sequences."""
    added_memory_bytes: int
    """Peak memory above that of the imported libraries."""


class Tokenized(BaseModel):
    """Speed of ingest (documents → cache), compared with the bare tokenizer on the same texts in memory."""

    num_tokens: int
    tokens_per_second: float
    bare_tokens_per_second: float
    ratio: float
    """Median over pairs of repeats."""


class LoadingSpeed(BaseModel):
    sequence_length: int
    num_tokens: int
    """Tokens per repeat."""
    tokens_per_second: float
    """At the beginning of a run."""
    far_tokens_per_second: float | None
    """More than 10^12 tokens into a run; None if the period of the shares is too long to get there without counting."""
    far_ratio: float | None
    """Far over near, median over pairs."""
    first_batch_seconds: float
    """Time to open the cache and draw the first batch at step `first_batch_step`."""
    first_batch_step: int


class MixtureBench(BaseModel):
    """The result of the benchmark, with its conditions."""

    mixture: str
    requested_token_shares: dict[str, float]
    text_bytes: int
    tokenizer: str
    vocabulary_size: int
    sequence_length: int
    num_sequences: int
    stopped_after_sequences: int
    late_sequence: int
    seed: int
    repeats: int
    buffer_documents: int
    """Documents in the shuffle buffer of each source of interleave_datasets."""
    cpu_cores: int
    ours: Side
    interleaved: Side
    interleaved_by_length: Delivered
    """interleave_datasets with probabilities corrected for each source's mean document length, which requires tokenising it
    first."""
    text_speed_ratio: float
    """Speed of ours over that of interleave_datasets from text to sequences, median over pairs."""
    tokenized: Tokenized
    loaded: list[LoadingSpeed]


MEGA = 1e6


def mixture_table(bench: MixtureBench) -> RenderableType:
    return Group(
        "",
        _shares_table(bench),
        _run_table(bench),
        _speed_table(bench.tokenized, bench.loaded),
        _rests_on(bench),
    )


def _shares_table(bench: MixtureBench) -> Table:
    table = Table(
        f"Delivered token shares over {bench.num_sequences:,} sequences of {bench.sequence_length:,} tokens",
        ["source", "requested", "sparsify", "interleave_datasets", "… by length*"],
    )
    columns = (
        bench.ours.delivered,
        bench.interleaved.delivered,
        bench.interleaved_by_length,
    )
    for name, requested in bench.requested_token_shares.items():
        given = (f"{column.token_shares[name]:.1%}" for column in columns)
        table.add(name, f"{requested:.1%}", *given)
    table.add_rule()
    deviations = (f"{column.largest_deviation_sequences:,.1f} sequences" for column in columns)
    table.add("largest deviation at any step", "", *deviations)
    texts = (f"{column.text_positions:.1%}" for column in columns)
    table.add("sequence positions with text", "", *texts)
    cut = (f"{column.cut_documents:,}" for column in columns)
    table.add("documents shorter than a sequence but split", "", *cut)
    return table


def _run_table(bench: MixtureBench) -> Table:
    ours, theirs = bench.ours, bench.interleaved
    table = Table(
        f"The run, stopped after sequence {bench.stopped_after_sequences:,} and resumed",
        ["", "sparsify", "interleave_datasets", "ratio"],
    )
    _add(
        table,
        "documents in the uninterrupted run",
        [f"{s.resumed.documents:,}" for s in _sides(bench)],
    )
    _add(table, "lost by the resume", [f"{s.resumed.lost:,}" for s in _sides(bench)])
    _add(table, "repeated by the resume", [f"{s.resumed.repeated:,}" for s in _sides(bench)])
    table.add_rule()
    _add(
        table,
        "text → sequences, M tokens/s",
        [f"{side.text_tokens_per_second / MEGA:.2f}" for side in _sides(bench)],
        _as_fast(bench.text_speed_ratio),
    )
    cached = ours.cached_tokens_per_second or 0.0
    _add(
        table,
        "the same text again (cache), M tokens/s",
        [f"{cached / MEGA:.1f}", f"{theirs.text_tokens_per_second / MEGA:.2f} (no cache)"],
        _as_fast(cached / theirs.text_tokens_per_second),
    )
    late = theirs.late_resume_seconds
    _add(
        table,
        f"resume at sequence {bench.late_sequence:,}",
        [_seconds(ours.late_resume_seconds), f"{_seconds(late)} from state"],
        _as_fast(late / ours.late_resume_seconds),
    )
    skip = theirs.late_skip_seconds or 0.0
    _add(
        table,
        "the same without saved state",
        [_seconds(ours.late_resume_seconds), f"{_seconds(skip)} with skip()"],
        _as_fast(skip / ours.late_resume_seconds),
    )
    _add(
        table,
        "peak memory (above the imports)",
        [_memory(side) for side in _sides(bench)],
        f"{ours.added_memory_bytes / max(theirs.added_memory_bytes, 1):.2f} × above the imports",
    )
    return table


def _speed_table(tokenized: Tokenized, loaded: Sequence[LoadingSpeed]) -> Table:
    table = Table("sparsify in one process, M tokens/s", ["", "sparsify", "baseline", "ratio"])
    table.add(
        f"ingest: documents → cache, {tokenized.num_tokens / MEGA:.1f}M tokens",
        f"{tokenized.tokens_per_second / MEGA:.2f}",
        f"{tokenized.bare_tokens_per_second / MEGA:.2f} bare tokenizer, text in memory",
        f"{tokenized.ratio:.2f}",
    )
    for one in loaded:
        table.add(
            f"load sequences of {one.sequence_length:,}, 10^12 tokens into a run",
            "–" if one.far_tokens_per_second is None else f"{one.far_tokens_per_second / MEGA:.1f}",
            f"{one.tokens_per_second / MEGA:.1f} at its start",
            "–" if one.far_ratio is None else f"{one.far_ratio:.2f}",
        )
    first = loaded[0]
    table.add(
        f"open the cache, draw the first batch at step {first.first_batch_step:,}",
        _seconds(first.first_batch_seconds),
    )
    return table


def _rests_on(bench: MixtureBench) -> Text:
    loaded = bench.loaded[0]
    return Text(
        f"Mixture {bench.mixture}: {bench.text_bytes / MEGA:.1f} MB of JSON lines in the file cache. Tokenizer "
        f"{bench.tokenizer}, {bench.vocabulary_size:,} entries. Seed {bench.seed}; {bench.cpu_cores} core(s).\n"
        f"Times are medians of {bench.repeats} interleaved repeat(s), ratios are medians over pairs; one repeat of "
        f"loading is {loaded.num_tokens / MEGA:.1f}M tokens.\n"
        f"interleave_datasets: shuffle buffers of {bench.buffer_documents:,} documents, probabilities = requested shares, "
        "state_dict() and load_state_dict().\n"
        "* probabilities divided by each source's mean document length in tokens, which is known only after tokenising.",
        "dim",
    )


def _sides(bench: MixtureBench) -> tuple[Side, Side]:
    return bench.ours, bench.interleaved


def _add(table: Table, label: str, values: Sequence[str], ratio: str = "") -> None:
    table.add(label, *values, ratio)


def _as_fast(ratio: float) -> str:
    return f"{ratio:,.0f} × as fast" if ratio >= 100 else f"{ratio:.2g} × as fast"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _memory(side: Side) -> str:
    return f"{side.peak_memory_bytes / MEGA:,.0f} MB ({side.added_memory_bytes / MEGA:,.0f})"
