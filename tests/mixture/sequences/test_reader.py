"""Sequences hold every document once per epoch, separated from its neighbours, whenever and wherever they are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from sparsify.errors import MixtureError
from sparsify.mixture.sequences.reader import (
    NO_LOSS,
    PackedSequence,
    SequenceReader,
    collate,
    held_out_sequences,
    read_sequence,
)
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.shares import Shares
from sparsify.mixture.sequences.stream import TrainingStream, hash_of_counts
from sparsify.mixture.tokens.ingest import IngestSession
from sparsify.mixture.tokens.pool import IngestSizes
from sparsify.mixture.tokens.tokenized_source import ShardDocuments, TokenizedSource
from sparsify.recipe.mixture import MixtureSection
from tests.mixture.conftest import SMALL, documents_of, ingest_of

SHARES = {"stories": 0.7, "chats": 0.3}
Pair = tuple[int, int]
"""A token and its label."""

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def reader_of(tokenized: dict[str, TokenizedSource], sequence_length: int, seed: int = 1) -> SequenceReader:
    return SequenceReader(tokenized, SourceSchedule(Shares.constant(SHARES)), sequence_length, seed)


def sequence_of(reader: SequenceReader, index: int) -> PackedSequence:
    name, rank = reader.schedule.locate(index)
    return read_sequence(reader.streams[name], rank)[0]


def training_documents(source: TokenizedSource) -> list[list[Pair]]:
    """Tokens and labels of every training document, by plain Python."""
    found = []
    for ids, mask, held_out in documents_of(source):
        if not held_out:
            labels = [i if m else NO_LOSS for i, m in zip(ids[1:], mask[1:], strict=True)]
            found.append(list(zip(ids, [*labels, NO_LOSS], strict=True)))
    return found


def epoch_sequences(reader: SequenceReader, name: str, epoch: int) -> list[PackedSequence]:
    """All sequences of one epoch of one source."""
    per_epoch = reader.streams[name].num_sequences
    wanted, found, index = range(epoch * per_epoch, (epoch + 1) * per_epoch), [], 0
    while len(found) < per_epoch:
        source, rank = reader.schedule.locate(index)
        if source == name and rank in wanted:
            found.append(sequence_of(reader, index))
        index += 1
    return found


def pieces_of(sequence: PackedSequence, end_token: int) -> list[list[Pair]]:
    """The documents' pieces in a sequence, without the padding at its end."""
    starts = np.flatnonzero(sequence.position_ids == 0).tolist()
    pieces = []
    for start, stop in zip(starts, [*starts[1:], len(sequence.input_ids)], strict=True):
        assert sequence.position_ids[start:stop].tolist() == list(range(stop - start))
        ids, labels = sequence.input_ids[start:stop], sequence.labels[start:stop]
        pieces.append(list(zip(ids.tolist(), labels.tolist(), strict=True)))
    while pieces and pieces[-1] == [(end_token, NO_LOSS)]:
        pieces.pop()
    return pieces


@pytest.mark.parametrize("name", ["stories", "chats"])
@pytest.mark.parametrize("sequence_length", [17, 64, 1000])
def test_every_training_document_occurs_exactly_once_per_epoch(
    tokenized: dict[str, TokenizedSource], name: str, sequence_length: int
) -> None:
    source, reader = tokenized[name], reader_of(tokenized, sequence_length)
    expected = Counter(
        tuple(document[first : first + sequence_length])
        for document in training_documents(source)
        for first in range(0, len(document), sequence_length)
    )
    orders = []
    for epoch in range(2):
        sequences = epoch_sequences(reader, name, epoch)
        pieces = [p for sequence in sequences for p in pieces_of(sequence, source.info.end_token)]
        found = Counter(map(tuple, pieces))
        # A remainder that consists of the end token only looks like padding.
        assert found - expected == Counter()
        assert set(expected - found) <= {((source.info.end_token, NO_LOSS),)}
        orders.append(pieces)
    assert orders[0] != orders[1]


@few
@given(index=st.integers(0, 5_000), sequence_length=st.integers(2, 200), seed=st.integers(0, 9))
def test_a_sequence_does_not_depend_on_what_was_read_before(
    tokenized: dict[str, TokenizedSource], index: int, sequence_length: int, seed: int
) -> None:
    sequence = sequence_of(reader_of(tokenized, sequence_length, seed), index)
    again = reader_of(tokenized, sequence_length, seed)
    sequence_of(again, index + 13)
    batch = again.batch(max(0, index - 5), 11)
    row = index - max(0, index - 5)
    assert again.names[int(batch.sources[row])] == sequence.source
    for field, tensor in batch.tensors.items():
        assert tensor[row].tolist() == getattr(sequence, field).tolist()


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 8), (2, 4), (4, 1), (8, 1)])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    tokenized: dict[str, TokenizedSource], ranks: int, micro_batch: int
) -> None:
    whole = reader_of(tokenized, 32).batch(40, 8).tensors["input_ids"]
    readers = [reader_of(tokenized, 32) for _ in range(ranks)]
    parts = [
        readers[(first // micro_batch) % ranks].batch(40 + first, micro_batch) for first in range(0, 8, micro_batch)
    ]
    assert torch.equal(torch.cat([part.tensors["input_ids"] for part in parts]), whole)


def test_a_growing_source_gives_the_sequences_of_a_complete_one(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    sizes = IngestSizes(shard_tokens=120, batch_documents=3)
    cold, warm = (
        {
            name: ingest_of(mixture, name, tokenizer, tmp_path / folder, tokens, 40, sizes)
            for name, tokens in {"stories": 900, "chats": 500}.items()
        }
        for folder in ("cold", "warm")
    )
    expected = reader_of({name: task.run() for name, task in warm.items()}, 24)
    with IngestSession(cold["stories"]) as stories, IngestSession(cold["chats"]) as chats:
        while not all(task.open().num_shards for task in cold.values()):
            stories.step()
            chats.step()
        reader = reader_of({name: task.open() for name, task in cold.items()}, 24)
        waits = 0
        for index in range(200):
            while not reader.is_available(index, 1):
                waits += 1
                if not stories.step() | chats.step():
                    assert reader.is_available(index, 1), "everything is cached, but the reader waits"
            for field in ("input_ids", "position_ids", "labels"):
                one, other = sequence_of(reader, index), sequence_of(expected, index)
                assert getattr(one, field).tolist() == getattr(other, field).tolist()
    assert waits > 5
    last = reader.schedule.locate(199)
    assert reader.streams[last[0]].locate(last[1])[0] > 0, "later epochs were compared as well"


def test_counted_sequences_are_stored(
    mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    source = ingest_of(mixture, "stories", tokenizer, tmp_path / "cache", sizes=SMALL).run()
    counted = TrainingStream(source, 32, 1).num_sequences
    stored = source.cache.folder / "sequences-32.npy"
    counts = np.load(stored)[:-1]
    assert 0 < len(counts) <= source.num_shards
    # Another number in the file is believed, with its hash: the shards are not packed again.
    counts[0] += 1000
    np.save(stored, np.append(counts, hash_of_counts(counts)))
    assert TrainingStream(source, 32, 1).num_sequences == counted + 1000
    assert TrainingStream(source, 33, 1).num_sequences < counted + 1000


def test_held_out_documents_never_reach_training(
    tokenized: dict[str, TokenizedSource], tokenizer: PreTrainedTokenizerFast
) -> None:
    reader = reader_of(tokenized, 32)
    for name, source in tokenized.items():
        training = [sequence.input_ids for sequence in epoch_sequences(reader, name, 0)]
        trained_text = tokenizer.decode(np.concatenate(training))
        whole = [sequence.input_ids for sequence in held_out_sequences(source, 32, 10**6)]
        held_out_text = tokenizer.decode(np.concatenate(whole))
        markers = [f"marker{number}x" for number in range(60)]
        held_out = [marker for marker in markers if marker in held_out_text]
        assert len(held_out) >= 3
        assert not [marker for marker in held_out if marker in trained_text]


def test_held_out_sequences_are_whole_and_spread_over_all_held_out_documents(
    tokenized: dict[str, TokenizedSource],
) -> None:
    source = tokenized["stories"]
    every = held_out_sequences(source, 16, 10**6)
    held_out = [ids for ids, _, side in documents_of(source) if side]
    row = [token for ids in held_out for token in ids]
    assert [w.input_ids.tolist() for w in every] == [row[start : start + 16] for start in range(0, len(row) - 15, 16)]
    chosen = [
        next(i for i, w in enumerate(every) if np.array_equal(w.input_ids, s.input_ids))
        for s in held_out_sequences(source, 16, 3)
    ]
    assert chosen == [i * len(every) // 3 for i in range(3)]


def test_held_out_sequences_keep_documents_apart(tokenized: dict[str, TokenizedSource]) -> None:
    source = tokenized["chats"]
    documents = [(ids, mask) for ids, mask, side in documents_of(source) if side]
    row: list[tuple[int, int, int]] = []
    for ids, mask in documents:
        labels = [i if m else NO_LOSS for i, m in zip(ids[1:], mask[1:], strict=True)]
        row += zip(range(len(ids)), ids, [*labels, NO_LOSS], strict=True)
    for number, sequence in enumerate(held_out_sequences(source, 10, 10**6)):
        positions, ids, labels = zip(*row[number * 10 : number * 10 + 10], strict=True)
        assert sequence.input_ids.tolist() == list(ids)
        assert sequence.labels.tolist() == list(labels)
        assert sequence.position_ids.tolist() == [min(p, i) for i, p in enumerate(positions)]


def test_too_little_held_out_text_is_refused_with_the_source_named(
    tokenized: dict[str, TokenizedSource],
) -> None:
    with pytest.raises(MixtureError, match=r"'chats' holds out .* less than one sequence of 100000"):
        held_out_sequences(tokenized["chats"], 100_000, 4)


def test_collate_gives_long_tensors(tokenized: dict[str, TokenizedSource]) -> None:
    reader = reader_of(tokenized, 8)
    sequences = [sequence_of(reader, i) for i in range(3)]
    batch = collate(sequences)
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "position_ids", "labels"), ((3, 8), torch.int64)
    )
    assert batch["labels"][2].tolist() == sequences[2].labels.tolist()


def test_another_seed_gives_another_order(tokenized: dict[str, TokenizedSource]) -> None:
    one, other = (reader_of(tokenized, 64, seed) for seed in (1, 2))
    assert not np.array_equal(sequence_of(one, 0).input_ids, sequence_of(other, 0).input_ids)


@pytest.mark.parametrize("budgets", [(150, 700), (40, 330, 331, 2000), (100, 10**9)])
def test_an_extended_run_continues_its_stream_and_repeats_nothing(
    budgets: tuple[int, ...], mixture: MixtureSection, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def stream_of(place: int) -> TrainingStream:
        task = ingest_of(mixture, "stories", tokenizer, tmp_path, budgets[place], 1, SMALL)
        need = replace(task.need, earlier_train_tokens=budgets[:place])
        return TrainingStream(replace(task, need=need).run(), 16, seed=1)

    delivered: list[PackedSequence] = []
    for place, budget in enumerate(budgets):
        stream = stream_of(place)
        # What was trained on under the shorter budgets is where it was, and the stream continues behind it.
        count = min(budget // 16, stream.num_sequences)
        found = [read_sequence(stream, rank)[0] for rank in range(count)]
        for old, new in zip(delivered, found, strict=False):
            assert np.array_equal(old.input_ids, new.input_ids)
        delivered = found
    stream = stream_of(len(budgets) - 1)
    whole = [read_sequence(stream, rank)[0] for rank in range(stream.num_sequences)]
    padding = tokenizer.eos_token_id
    tokens = Counter(token for sequence in whole for token in sequence.input_ids.tolist())
    wanted = Counter(
        token
        for number in range(stream.source.num_shards)
        for token in tokens_of(stream.source.train_documents(number))
    )
    assert {token: count for token, count in tokens.items() if count != wanted[token] and token != padding} == {}


def tokens_of(documents: ShardDocuments) -> list[int]:
    return [
        token
        for start, length in zip(documents.starts, documents.lengths, strict=True)
        for token in documents.shard.tokens[start : start + length].tolist()
    ]
