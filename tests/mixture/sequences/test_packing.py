"""Packing loses no token, cuts no short document, and wastes next to nothing."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.sequences.packing import count_windows, pack_documents


def shuffle(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    window_tokens=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_every_token_is_in_exactly_one_window(
    lengths: list[int], window_tokens: int, seed: int
) -> None:
    packing = pack_documents(np.array(lengths), window_tokens, shuffle(seed))
    taken = np.zeros((len(lengths), max(lengths)), dtype=int)
    for window in range(packing.num_windows):
        pieces = packing.pieces(window)
        assert 0 < packing.length[pieces].sum() <= window_tokens
        for document, start, length in zip(
            packing.document[pieces], packing.start[pieces], packing.length[pieces], strict=True
        ):
            taken[document, start : start + length] += 1
            if lengths[document] <= window_tokens:
                assert (start, length) == (0, lengths[document]), "a short document was cut"
    assert taken.sum(1).tolist() == lengths
    assert taken.max() == 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    window_tokens=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_the_number_of_windows_does_not_depend_on_any_order(
    lengths: list[int], window_tokens: int, seed: int
) -> None:
    order = shuffle(seed).permutation(len(lengths))
    packing = pack_documents(np.array(lengths)[order], window_tokens, shuffle(seed + 1))
    assert packing.num_windows == count_windows(np.array(lengths), window_tokens)


def test_windows_of_text_like_lengths_are_at_least_99_percent_full() -> None:
    for window_tokens, median in ((256, 120), (2048, 500), (4096, 300), (4096, 3000)):
        drawn = shuffle().lognormal(np.log(median), 1.2, size=2_000_000 // median)
        lengths = np.maximum(drawn, 4).astype(np.int64)
        num_windows = count_windows(lengths, window_tokens)
        assert lengths.sum() / (num_windows * window_tokens) >= 0.99


def test_another_shuffle_packs_other_neighbours_in_another_order() -> None:
    lengths = np.full(64, 5)
    one, other = (pack_documents(lengths, 20, shuffle(seed)) for seed in (1, 2))
    groups = [
        {frozenset(p.document[p.pieces(window)].tolist()) for window in range(p.num_windows)}
        for p in (one, other)
    ]
    assert groups[0] != groups[1]
    assert one.document.tolist() != other.document.tolist()
