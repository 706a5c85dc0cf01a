from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.tokens import TokenizedSource
from sparsify.mixture.windows import NO_LOSS, Window, WindowReader, collate

SHARES = {"stories": 0.7, "chats": 0.3}
Token = tuple[int, int, int]
"""Input, position within its document, label: of one token."""


def documents_of(source: TokenizedSource) -> list[list[Token]]:
    """Every training document by plain Python: what its tokens must look like wherever they land."""
    documents = []
    for number in np.flatnonzero(~source.held_out):
        start, length = int(source.starts[number]), int(source.lengths[number])
        ids = source.tokens(start, start + length).tolist()
        mask = source.loss_mask(start, start + length).tolist()
        labels = [i if m else NO_LOSS for i, m in zip(ids[1:], mask[1:], strict=True)]
        documents.append(list(zip(ids, range(length), [*labels, NO_LOSS], strict=True)))
    return documents


def source_windows(reader: WindowReader, name: str, count: int) -> list[Window]:
    windows = (reader.window(i) for i in range(100_000) if reader.schedule.locate(i)[0] == name)
    return [next(windows) for _ in range(count)]


def stream_of(windows: list[Window]) -> list[tuple[int, int]]:
    return [
        pair
        for window in windows
        for pair in zip(window.input_ids.tolist(), window.labels.tolist(), strict=True)
    ]


@pytest.mark.parametrize("name", ["stories", "chats"])
def test_every_training_document_appears_exactly_once_an_epoch(
    tokenized: dict[str, TokenizedSource], name: str
) -> None:
    source, window_tokens = tokenized[name], 17
    epoch_tokens = source.num_train_tokens
    reader = WindowReader(tokenized, SHARES, window_tokens, seed=3)
    windows = source_windows(reader, name, 2 * epoch_tokens // window_tokens + 1)
    stream = stream_of(windows)
    documents = [[(i, label) for i, _, label in document] for document in documents_of(source)]

    orders = []
    for epoch in range(2):
        seen = stream[epoch * epoch_tokens : (epoch + 1) * epoch_tokens]
        order: list[int] = []
        while seen:
            number = next(
                n for n, d in enumerate(documents) if seen[: len(d)] == d and n not in order
            )
            order.append(number)
            seen = seen[len(documents[number]) :]
        assert sorted(order) == list(range(len(documents)))
        orders.append(order)
    assert orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(index=st.integers(0, 5_000), window_tokens=st.integers(1, 200), seed=st.integers(0, 9))
def test_positions_and_labels_follow_documents(
    tokenized: dict[str, TokenizedSource], index: int, window_tokens: int, seed: int
) -> None:
    reader = WindowReader(tokenized, SHARES, window_tokens, seed)
    window = reader.window(index)
    assert len(window.input_ids) == len(window.position_ids) == len(window.labels) == window_tokens

    # Neither the reader's past nor a neighbour's reading changes a window.
    again = WindowReader(tokenized, SHARES, window_tokens, seed)
    again.window(index + 13)
    assert np.array_equal(again.window(index).labels, window.labels)

    starts = np.flatnonzero(window.position_ids == 0)
    assert starts[0] == 0
    documents = documents_of(tokenized[window.source])
    for start, stop in zip(starts, [*starts[1:], window_tokens], strict=True):
        assert window.position_ids[start:stop].tolist() == list(range(stop - start))
        piece = list(
            zip(
                window.input_ids[start:stop].tolist(),
                window.labels[start:stop].tolist(),
                strict=True,
            )
        )
        assert any(
            piece == [(i, label) for i, _, label in document[first : first + len(piece)]]
            for document in documents
            # A piece begins where its document does, except at the window's start.
            for first in (range(len(document)) if start == 0 else (0,))
        )


def test_a_window_longer_than_a_source_goes_on_with_its_next_epochs(
    tokenized: dict[str, TokenizedSource],
) -> None:
    source = tokenized["chats"]
    epoch_tokens = source.num_train_tokens
    window = WindowReader(tokenized, {"chats": 1.0}, 3 * epoch_tokens, seed=0).window(0)
    first, second, third = np.split(window.input_ids, 3)
    assert sorted(first) == sorted(second) == sorted(third)


def test_held_out_documents_never_reach_training(
    tokenized: dict[str, TokenizedSource], tokenizer: PreTrainedTokenizerFast
) -> None:
    window_tokens = 32
    reader = WindowReader(tokenized, SHARES, window_tokens, seed=5)
    for name, source in tokenized.items():
        num_windows = 2 * source.num_train_tokens // window_tokens + 1
        training = [window.input_ids for window in source_windows(reader, name, num_windows)]
        trained_text = tokenizer.decode(np.concatenate(training))
        whole = [window.input_ids for window in reader.validation_windows(name, 10**6)]
        held_out_text = tokenizer.decode(np.concatenate(whole))
        markers = [f"marker{number}x" for number in range(60)]
        held_out = [marker for marker in markers if marker in held_out_text]
        assert len(held_out) >= 3
        assert not [marker for marker in held_out if marker in trained_text]


def test_validation_windows_are_whole_and_spread_over_all_held_out_documents(
    tokenized: dict[str, TokenizedSource],
) -> None:
    reader = WindowReader(tokenized, SHARES, 16, seed=1)
    every = reader.validation_windows("stories", 10**6)
    assert len(every) == tokenized["stories"].num_validation_tokens // 16
    some = reader.validation_windows("stories", 3)
    chosen = [
        next(i for i, w in enumerate(every) if np.array_equal(w.input_ids, s.input_ids))
        for s in some
    ]
    assert chosen == [i * len(every) // 3 for i in range(3)]


def test_too_little_held_out_text_is_refused_with_the_source_named(
    tokenized: dict[str, TokenizedSource],
) -> None:
    reader = WindowReader(tokenized, SHARES, 100_000, seed=1)
    with pytest.raises(MixtureError, match=r"'chats' holds out .* less than one window of 100000"):
        reader.validation_windows("chats", 4)


def test_collate_gives_long_tensors(tokenized: dict[str, TokenizedSource]) -> None:
    reader = WindowReader(tokenized, SHARES, 8, seed=1)
    windows = [reader.window(i) for i in range(3)]
    batch = collate(windows)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), ((3, 8), torch.int64)
    )
    assert batch["labels"][2].tolist() == windows[2].labels.tolist()


def test_another_seed_gives_another_order(tokenized: dict[str, TokenizedSource]) -> None:
    one, other = (WindowReader(tokenized, SHARES, 64, seed) for seed in (1, 2))
    assert not np.array_equal(one.window(0).input_ids, other.window(0).input_ids)


def test_tokens_are_read_across_shards(
    tokenized: dict[str, TokenizedSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tokenized["stories"]
    flat = source.tokens(0, int(source.lengths.sum()))
    monkeypatch.setattr("sparsify.mixture.cache.SHARD_TOKENS", 10)
    shards = tuple(flat[first : first + 10] for first in range(0, len(flat), 10))
    assert np.array_equal(replace(source, token_shards=shards).tokens(3, 47), flat[3:47])
