"""Packing loses no token, cuts no short document, and leaves few positions empty."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsify.mixture.sequences.packing import count_sequences, pack_documents


def shuffle(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    sequence_length=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_every_token_is_in_exactly_one_sequence(lengths: list[int], sequence_length: int, seed: int) -> None:
    packing = pack_documents(np.array(lengths), sequence_length, shuffle(seed))
    taken = np.zeros((len(lengths), max(lengths)), dtype=int)
    for sequence in range(len(packing.ends)):
        pieces = packing.pieces(sequence)
        assert 0 < packing.length[pieces].sum() <= sequence_length
        for document, start, length in zip(
            packing.document[pieces], packing.start[pieces], packing.length[pieces], strict=True
        ):
            taken[document, start : start + length] += 1
            if lengths[document] <= sequence_length:
                assert (start, length) == (0, lengths[document]), "a short document was cut"
    assert taken.sum(1).tolist() == lengths
    assert taken.max() == 1


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=60),
    sequence_length=st.integers(1, 40),
    seed=st.integers(0, 5),
)
def test_the_number_of_sequences_does_not_depend_on_any_order(
    lengths: list[int], sequence_length: int, seed: int
) -> None:
    order = shuffle(seed).permutation(len(lengths))
    packing = pack_documents(np.array(lengths)[order], sequence_length, shuffle(seed + 1))
    assert len(packing.ends) == count_sequences(np.array(lengths), sequence_length)


def test_sequences_of_text_like_lengths_are_at_least_99_percent_full() -> None:
    for sequence_length, median in ((256, 120), (2048, 500), (4096, 300), (4096, 3000)):
        drawn = shuffle().lognormal(np.log(median), 1.2, size=2_000_000 // median)
        lengths = np.maximum(drawn, 4).astype(np.int64)
        num_sequences = count_sequences(lengths, sequence_length)
        assert lengths.sum() / (num_sequences * sequence_length) >= 0.99


def test_another_shuffle_packs_other_neighbours_in_another_order() -> None:
    lengths = np.full(64, 5)
    one, other = (pack_documents(lengths, 20, shuffle(seed)) for seed in (1, 2))
    groups = [
        {frozenset(p.document[p.pieces(sequence)].tolist()) for sequence in range(len(p.ends))} for p in (one, other)
    ]
    assert groups[0] != groups[1]
    assert one.document.tolist() != other.document.tolist()
