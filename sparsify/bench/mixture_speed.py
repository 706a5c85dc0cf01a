"""`sparsify bench mixture`: our data path against `datasets.interleave_datasets` on the same files, in one process.

Both sides use the same tokenizer, sequence length, seed and cores. Repeats of both sides are interleaved, so that other load on
the machine slows both; ratios are medians over pairs of repeats.

Peak memory of a piece of work: run in a process of its own, since a process has only one peak.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import datasets

from sparsify.bench import mixture_pipelines
from sparsify.bench.corpus import Corpus, write_corpus
from sparsify.bench.mixture_pipelines import Interleaved, Ours
from sparsify.bench.mixture_report import (
    Delivered,
    LoadingSpeed,
    MixtureBench,
    Resumed,
    Side,
    Tokenized,
)
from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import MixtureError
from sparsify.mixture.tokens.encoder import Tokenizer, check_tokenizer
from sparsify.mixture.tokens.pool import SIZES
from sparsify.recipe.compose import load_mixture
from sparsify.recipe.training import SEED

STATUS = Path("/proc/self/status")


def peak_memory_bytes() -> int:
    """The most memory that this process has held since it began."""
    if STATUS.is_file():
        # Not ru_maxrss: Linux lets a child begin with its parent's peak.
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure_apart(works: dict[str, tuple[Any, ...]]) -> dict[str, tuple[int, int]]:
    """Runs each work, a function with its arguments, in a fresh process; all at the same time.

    Returns:
        Peak of the process, and what of it the work added to the libraries it had imported, in bytes.
    """
    context = multiprocessing.get_context("spawn")
    pools = {name: ProcessPoolExecutor(1, context) for name in works}
    try:
        futures: dict[str, Future[tuple[int, int]]] = {
            name: pool.submit(_measured, *works[name]) for name, pool in pools.items()
        }
        return {name: future.result() for name, future in futures.items()}
    finally:
        for pool in pools.values():
            pool.shutdown()


def _measured(work: Callable[..., None], *arguments: Any) -> tuple[int, int]:
    before = peak_memory_bytes()  # the function and its imports are here by now
    work(*arguments)
    peak = peak_memory_bytes()
    return peak, peak - before


MIN_SEQUENCES = 20
"""Minimum length of the run: it is stopped at half and resumed at 90%."""
LATE = 0.9
FIRST_BATCH_STEP = 1_000_000
FAR_TOKENS = 10**12


def bench_mixture(
    name_or_path: str,
    tokenizer_source: str,
    *,
    budget_tokens: int,
    sequence_length: int,
    buffer_documents: int,
    load_tokens: int,
    repeats: int,
    on_progress: Callable[[str], object],
) -> MixtureBench:
    """Measures both sides on the mixture's text, which is written to a temporary folder as JSON lines. Raises UserError
    if the mixture or tokenizer cannot be read, or there is too little text.
    """
    mixture = load_mixture(name_or_path)
    tokenizer = load_tokenizer(locate(tokenizer_source), tokenizer_source)
    check_tokenizer(tokenizer)
    _check_numbers(
        budget_tokens=budget_tokens,
        sequence_length=sequence_length,
        buffer_documents=buffer_documents,
        load_tokens=load_tokens,
        repeats=repeats,
    )
    num_sequences = budget_tokens // sequence_length
    if num_sequences < MIN_SEQUENCES:
        raise MixtureError(
            f"--budget-tokens {budget_tokens} gives only {num_sequences} sequences of {sequence_length} tokens.",
            allowed=f"At least {MIN_SEQUENCES} sequences.",
            next_step=f"Set --budget-tokens to {MIN_SEQUENCES * sequence_length} or more.",
        )
    with tempfile.TemporaryDirectory(prefix="sparsify-bench-") as folder, _quiet_datasets():
        on_progress("Writing the text out as JSON lines")
        corpus = write_corpus(mixture, Path(folder), budget_tokens)
        bench = _Bench(corpus, tokenizer, budget_tokens, sequence_length, buffer_documents)
        return bench.run(load_tokens, repeats, on_progress)


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            option = name.replace("_", "-")
            raise MixtureError(f"--{option} is {number}.", allowed="It must be 1 or more.")


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silences the warning that a resumed shuffle buffer loses documents; the table shows how many."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


@dataclass(frozen=True)
class _Times:
    """Seconds of the repeats, in the order of measurement."""

    ingest: list[float]
    draw: list[float]
    bare: list[float]
    interleaved: list[float]


class _Bench:
    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        budget_tokens: int,
        sequence_length: int,
        buffer_documents: int,
    ) -> None:
        self.corpus, self.tokenizer, self.folder = corpus, tokenizer, corpus.folder
        self.num_sequences = budget_tokens // sequence_length
        self.run_tokens = self.num_sequences * sequence_length
        self.half, self.late = self.num_sequences // 2, int(LATE * self.num_sequences)
        seed = SEED
        self.ours = Ours(corpus, tokenizer, sequence_length, seed, budget_tokens)
        self.theirs = Interleaved(corpus, tokenizer, sequence_length, seed, buffer_documents, corpus.shares)

    def run(self, load_tokens: int, repeats: int, on_progress: Callable[[str], object]) -> MixtureBench:
        on_progress("From text to sequences: ours, the bare tokenizer, interleave_datasets")
        times, tokenized = self._time_text(repeats)
        on_progress("Loading from the cache")
        sizes = (self.ours.sequence_length, 2 * self.ours.sequence_length)
        loaded = [self._load(size, load_tokens, repeats) for size in sizes]
        on_progress("Counting what ours delivers and what a resume does to it")
        ours_counted = mixture_pipelines.count_ours(self.ours, self.cache_dir, self.num_sequences, stop=self.half)
        on_progress("Counting what interleave_datasets delivers and what a resume does to it")
        theirs_counted, late_state = mixture_pipelines.count_interleaved(
            self.theirs, self.num_sequences, stop=self.half, late=self.late
        )
        by_length = mixture_pipelines.count_by_length(
            self.theirs, self.ours.tokenize(self.cache_dir), self.num_sequences
        )
        on_progress("Resuming late")
        ours_late, theirs_late, theirs_skip = self._resume_late(late_state, repeats)
        on_progress("Peak memory, each side in a process of its own")
        memory = measure_apart(
            {
                "ours": (_ours_from_text, self.ours, self.num_sequences, self.folder / "memory"),
                "theirs": (_theirs_from_text, self.theirs, self.num_sequences),
            }
        )
        text_seconds = [a + b for a, b in zip(times.ingest, times.draw, strict=True)]
        return MixtureBench(
            mixture=self.corpus.name,
            requested_token_shares=self.corpus.shares,
            text_bytes=self.corpus.num_bytes,
            tokenizer=Path(self.tokenizer.name_or_path).name,
            vocabulary_size=len(self.tokenizer),
            sequence_length=self.ours.sequence_length,
            num_sequences=self.num_sequences,
            stopped_after_sequences=self.half,
            late_sequence=self.late,
            seed=self.ours.seed,
            repeats=repeats,
            buffer_documents=self.theirs.buffer_documents,
            cpu_cores=available_cores(),
            ours=self._side(ours_counted, text_seconds, times.draw, (ours_late, None), memory["ours"]),
            interleaved=self._side(
                theirs_counted,
                times.interleaved,
                None,
                (theirs_late, theirs_skip),
                memory["theirs"],
            ),
            interleaved_by_length=by_length,
            text_speed_ratio=_ratio(times.interleaved, text_seconds),
            tokenized=tokenized,
            loaded=loaded,
        )

    def _side(
        self,
        counted: tuple[Delivered, Resumed],
        text: list[float],
        cached: list[float] | None,
        late: tuple[float, float | None],
        memory: tuple[int, int],
    ) -> Side:
        return Side(
            delivered=counted[0],
            resumed=counted[1],
            text_tokens_per_second=self.run_tokens / median(text),
            cached_tokens_per_second=self.run_tokens / median(cached) if cached else None,
            late_resume_seconds=late[0],
            late_skip_seconds=late[1],
            peak_memory_bytes=memory[0],
            added_memory_bytes=memory[1],
        )

    @property
    def cache_dir(self) -> Path:
        return self.folder / "cache-0"

    def _time_text(self, repeats: int) -> tuple[_Times, Tokenized]:
        times, num_tokens, bare_tokens = _Times([], [], [], []), 0, 0
        texts: list[str] = []
        for repeat in range(repeats):
            with _timed(times.ingest):
                sources = self.ours.tokenize(self.folder / f"cache-{repeat}")
            with _timed(times.draw):
                mixture_pipelines.draw_ours(self.ours.reader(self.folder / f"cache-{repeat}"), 0, self.num_sequences)
            if not texts:
                num_tokens = mixture_pipelines.tokens_in(sources)
                for name, source in sources.items():
                    read = source.cache.records[-1].read_documents
                    texts += self.corpus.texts(name, read)
            with _timed(times.bare):
                bare_tokens = self._tokenize_bare(texts)
            with _timed(times.interleaved):
                mixture_pipelines.draw_interleaved(iter(self.theirs.dataset()), self.num_sequences)
        return times, Tokenized(
            num_tokens=num_tokens,
            # Both rates count only the tokenizer's tokens; ours also adds the begin and end of each document.
            tokens_per_second=bare_tokens / median(times.ingest),
            bare_tokens_per_second=bare_tokens / median(times.bare),
            ratio=_ratio(times.bare, times.ingest),
        )

    def _tokenize_bare(self, texts: list[str]) -> int:
        backend = self.tokenizer.backend_tokenizer
        num_tokens, size = 0, SIZES.batch_documents
        for start in range(0, len(texts), size):
            batch = texts[start : start + size]
            encoded = backend.encode_batch_fast(batch, add_special_tokens=False)
            num_tokens += sum(map(len, encoded))
        return num_tokens

    def _load(self, sequence_length: int, load_tokens: int, repeats: int) -> LoadingSpeed:
        count = max(load_tokens // sequence_length, 1)
        near, far, first = [], [], []
        reader = self.ours.reader(self.cache_dir, sequence_length)
        mixture_pipelines.draw_ours(reader, 0, 1)
        far_sequence = self.ours.far_sequence(FAR_TOKENS, sequence_length)
        first_sequence = FIRST_BATCH_STEP * mixture_pipelines.GLOBAL_BATCH_SIZE
        anchor = self.ours.anchor(first_sequence)
        for repeat in range(repeats):
            # Each repeat reads different sequences, so that it packs new shards.
            with _timed(near):
                mixture_pipelines.draw_ours(reader, repeat * count, count)
            if far_sequence is not None:
                with _timed(far):
                    mixture_pipelines.draw_ours(reader, far_sequence + repeat * count, count)
            with _timed(first):
                fresh = self.ours.reader(self.cache_dir, sequence_length, anchor)
                fresh.batch(first_sequence, mixture_pipelines.GLOBAL_BATCH_SIZE)
        return LoadingSpeed(
            sequence_length=sequence_length,
            num_tokens=count * sequence_length,
            tokens_per_second=count * sequence_length / median(near),
            far_tokens_per_second=count * sequence_length / median(far) if far else None,
            far_ratio=_ratio(near, far) if far else None,
            first_batch_seconds=median(first),
            first_batch_step=FIRST_BATCH_STEP,
        )

    def _resume_late(self, state: dict, repeats: int) -> tuple[float, float, float]:
        from_number, from_state, from_skip = [], [], []
        for _ in range(repeats):
            with _timed(from_number):
                self.ours.reader(self.cache_dir).batch(self.late, 1)
            with _timed(from_state):
                resumed = self.theirs.dataset(tracked=True)
                resumed.load_state_dict(state)
                next(iter(resumed))
            with _timed(from_skip):
                next(iter(self.theirs.dataset().skip(self.late)))
        return median(from_number), median(from_state), median(from_skip)


def _ours_from_text(side: Ours, num_sequences: int, cache_dir: Path) -> None:
    side.tokenize(cache_dir)
    mixture_pipelines.draw_ours(side.reader(cache_dir), 0, num_sequences)


def _theirs_from_text(side: Interleaved, num_sequences: int) -> None:
    with _quiet_datasets():
        mixture_pipelines.draw_interleaved(iter(side.dataset()), num_sequences)


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)


def _ratio(slower: list[float], faster: list[float]) -> float:
    """Speed-up: the median over pairs."""
    return median(a / b for a, b in zip(slower, faster, strict=True))


def available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
