"""Counting what a run delivered, and what a resume did to it. The same for both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparsify.benchmarks.corpus import Corpus
from sparsify.benchmarks.interleaved import Interleaved, take
from sparsify.benchmarks.mixture_result import Delivered, Resumed
from sparsify.benchmarks.ours import Ours, pieces_of, tokens_in
from sparsify.mixture.tokens import TokenizedSource
from sparsify.mixture.windows import WindowReader

IntArray = NDArray[np.int64]
State = dict[str, Any]
"""Of an IterableDataset."""


def count_ours(
    side: Ours, cache_dir: Path, num_windows: int, *, stop: int
) -> tuple[Delivered, Resumed]:
    """Our run uninterrupted, and stopped after `stop` windows and resumed."""
    reader = side.reader(cache_dir)
    delivered = _deliver_ours(reader, side.corpus.shares, num_windows)
    whole = _pieces(reader, 0, num_windows)
    before = _pieces(side.reader(cache_dir), 0, stop)
    after = _pieces(side.reader(cache_dir), stop, num_windows)
    return delivered, _count_resumed(whole, before + after)


def count_interleaved(
    side: Interleaved, num_windows: int, *, stop: int, late: int
) -> tuple[tuple[Delivered, Resumed], State]:
    """The same for interleave_datasets; also gives its state after `late` windows."""
    dataset = side.dataset(tracked=True)
    rows = iter(dataset)
    before = take(rows, stop)
    stopped = dataset.state_dict()
    middle = take(rows, late - stop)
    late_state = dataset.state_dict()
    windows = before + middle + take(rows, num_windows - late)
    dataset = side.dataset(tracked=True)
    dataset.load_state_dict(stopped)
    resumed = before + take(iter(dataset), num_windows - stop)
    delivered = _deliver_interleaved(windows, side.corpus)
    return (delivered, _count_resumed(_documents(windows), _documents(resumed))), late_state


def count_by_length(
    side: Interleaved, sources: Mapping[str, TokenizedSource], num_windows: int
) -> Delivered:
    """With the probabilities that give the asked shares of tokens on average."""
    weights = {}
    for name, source in sources.items():
        num_documents = sum(record.num_documents for record in source.cache.records)
        weights[name] = side.corpus.shares[name] * num_documents / tokens_in({name: source})
    total = sum(weights.values())
    weighed = replace(side, probabilities={name: one / total for name, one in weights.items()})
    windows = take(iter(weighed.dataset(tracked=True)), num_windows)
    return _deliver_interleaved(windows, side.corpus)


def _count_resumed(whole: Counter[Hashable], resumed: Counter[Hashable]) -> Resumed:
    """Compares the documents of a resumed run with those of the same run uninterrupted."""
    # A run of several epochs repeats documents by itself, which is no fault of the resume.
    repeated = sum(max(0, count - max(whole[one], 1)) for one, count in resumed.items())
    return Resumed(documents=whole.total(), lost=(whole - resumed).total(), repeated=repeated)


def _pieces(reader: WindowReader, first: int, stop: int) -> Counter[Hashable]:
    """How often each piece is in our windows first, …, stop - 1."""
    return Counter(
        piece for index in range(first, stop) for piece, _, _ in pieces_of(reader, index)
    )


def _deliver_ours(reader: WindowReader, shares: Mapping[str, float], num_windows: int) -> Delivered:
    """What our first windows hold."""
    given = np.zeros((num_windows, len(shares)))
    names = list(shares)
    text_tokens = num_cut = 0
    for index in range(num_windows):
        given[index, names.index(reader.schedule.locate(index)[0])] = 1.0
        for _, length, is_cut in pieces_of(reader, index):
            text_tokens += length
            num_cut += is_cut
    positions = num_windows * reader.window_tokens
    return _delivered(given, shares, text_tokens / positions, num_cut)


def _deliver_interleaved(windows: Sequence[IntArray], corpus: Corpus) -> Delivered:
    """What windows of interleave_datasets hold, by the document of each of their tokens.

    Documents that end at a window's end because `group_texts` dropped their rest are not counted as cut.
    """
    # The corpus numbers documents source by source.
    firsts = list(corpus.first_document.values())
    given = np.zeros((len(windows), len(firsts)))
    for index, documents in enumerate(windows):
        source = np.searchsorted(firsts, documents, side="right") - 1
        given[index] = np.bincount(source, minlength=len(firsts)) / len(documents)
    starts, lengths = _runs(np.concatenate(windows))
    size = len(windows[0])
    is_cut = (starts // size != (starts + lengths - 1) // size) & (lengths <= size)
    return _delivered(given, corpus.shares, 1.0, int(is_cut.sum()))


def _documents(windows: Sequence[IntArray]) -> Counter[Hashable]:
    """How often each document was drawn by interleave_datasets."""
    tokens = np.concatenate(windows)
    return Counter(tokens[_runs(tokens)[0]].tolist())


def _runs(values: IntArray) -> tuple[IntArray, IntArray]:
    """Start and length of every run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return starts, np.diff(starts, append=len(values))


def _delivered(
    given: NDArray[np.float64], shares: Mapping[str, float], text_positions: float, num_cut: int
) -> Delivered:
    """Delivered from the part of each window that each source got. [N, S]"""
    num_windows = np.arange(1, len(given) + 1)[:, None]
    deviation = np.abs(np.cumsum(given, axis=0) - num_windows * np.array(list(shares.values())))
    return Delivered(
        token_shares=dict(zip(shares, given.mean(axis=0).tolist(), strict=True)),
        largest_deviation_windows=float(deviation.max()),
        text_positions=text_positions,
        cut_documents=num_cut,
    )
