"""What `sparsify bench mixture` measures."""

from __future__ import annotations

from pydantic import BaseModel


class Delivered(BaseModel):
    """What a run delivered, counted over all its windows."""

    token_shares: dict[str, float]
    """Share of all window positions that each source got."""
    largest_deviation_windows: float
    """The furthest that any source was from its asked share times n, after any n windows."""
    text_positions: float
    """Share of window positions that carry text; the rest is padding."""
    cut_documents: int
    """Documents shorter than a window that lie in more than one."""


class Resumed(BaseModel):
    """A run stopped half way and resumed, against the same run uninterrupted."""

    documents: int
    """Documents of the uninterrupted run; one longer than a window counts once for each window that it lies in, where
    a pipeline draws these pieces one by one."""
    lost: int
    """Documents of the uninterrupted run that the resumed one never trained on, or fewer times."""
    repeated: int
    """Documents that the resumed run trained on again although the uninterrupted one did not."""


class Side(BaseModel):
    """One side of the comparison. Times and rates are medians."""

    delivered: Delivered
    resumed: Resumed
    text_tokens_per_second: float
    """From text to ready windows."""
    cached_tokens_per_second: float | None
    """From tokens that an earlier run left in a cache; None where there is no cache."""
    late_resume_seconds: float
    """First window after a restart late in the run, from saved state."""
    late_skip_seconds: float | None
    """The same without saved state, by skipping; None where nothing has to be skipped."""
    peak_memory_bytes: int
    """Of the whole process that goes from text to windows."""
    added_memory_bytes: int
    """What of it the work added to the imported libraries."""


class Tokenized(BaseModel):
    """Ingest, documents → cache, against the bare tokenizer on the same texts, in memory already."""

    num_tokens: int
    tokens_per_second: float
    bare_tokens_per_second: float
    ratio: float
    """Median of the ratios of the pairs."""


class Loaded(BaseModel):
    """Windows from a warm cache in one process."""

    window_tokens: int
    num_tokens: int
    """Tokens of one repeat."""
    tokens_per_second: float
    """At the beginning of a plan."""
    far_tokens_per_second: float | None
    """More than 10^12 tokens into a plan; None where shares have so many digits that one must count up to there."""
    far_ratio: float | None
    """Median of the ratios of the pairs: far over near."""
    first_batch_seconds: float
    """Opening the cache and drawing the first batch at step `first_batch_step`."""
    first_batch_step: int


class MixtureBench(BaseModel):
    """All of it, with what it rests on."""

    mixture: str
    asked_token_shares: dict[str, float]
    text_bytes: int
    tokenizer: str
    vocabulary_size: int
    window_tokens: int
    num_windows: int
    stopped_after_windows: int
    late_window: int
    seed: int
    repeats: int
    buffer_documents: int
    """Of the shuffle buffer of each source of interleave_datasets."""
    cpu_cores: int
    ours: Side
    interleaved: Side
    interleaved_by_length: Delivered
    """interleave_datasets with probabilities that allow for each source's mean document length, which must be known
    before."""
    text_speed_ratio: float
    """Median of the ratios of the pairs: ours over interleave_datasets, from text to windows."""
    tokenized: Tokenized
    loaded: list[Loaded]
