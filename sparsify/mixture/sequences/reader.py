"""Reads sequences: concatenated pieces of documents, with positions and labels that separate the documents.

Training sequences are packed (`packing`) and located by their number (`schedule` and `stream`). Evaluation sequences are
the concatenated held-out documents, cut every T tokens, so that they have no empty positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.errors import MixtureError
from sparsify.mixture.sequences.packing import Packing
from sparsify.mixture.sequences.schedule import SourceSchedule
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.tokens.shards import Shard
from sparsify.mixture.tokens.tokenized_source import ShardDocuments, TokenizedSource

NO_LOSS = -100
"""Label of a position without loss; PyTorch's cross entropy ignores it."""

FIELDS = ("input_ids", "position_ids", "labels")

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PackedSequence:
    """One sequence of T tokens. Labels are already shifted: do not shift them again.

    Args:
        source: Name of the source.
        input_ids: Token ids. [T] int64
        position_ids: Position within the document; also 0 at the start of the sequence. [T] int64
        labels: The next token of the same document; NO_LOSS at the end of a document, or if the next token carries no
            loss. [T] int64
    """

    source: str
    input_ids: IntArray
    position_ids: IntArray
    labels: IntArray


@dataclass(frozen=True)
class Batch:
    """Stacked sequences and their sources.

    Attributes:
        tensors: `input_ids`, `position_ids` and `labels` as in `PackedSequence`. [B, T] int64 each
        sources: Index of each sequence's source in `SequenceReader.names`. [B] int64
    """

    tensors: dict[str, torch.Tensor]
    sources: torch.Tensor


class SequenceReader:
    """Reads any training sequence of a run by its number."""

    def __init__(
        self,
        sources: Mapping[str, TokenizedSource],
        schedule: SourceSchedule,
        sequence_length: int,
        seed: int,
    ) -> None:
        self.sequence_length, self.schedule = sequence_length, schedule
        self.names = list(schedule.names)
        self._end_token = sources[self.names[0]].info.end_token
        self.streams = {name: TrainingStream(sources[name], sequence_length, seed) for name in self.names}

    def is_available(self, first: int, count: int) -> bool:
        """Whether the sequences first, …, first + count - 1 can be read now."""
        last = dict(self.schedule.sequences_of(first, count))
        return all(self.streams[name].is_available(rank) for name, rank in last.items())

    def batch(self, first: int, count: int) -> Batch:
        """The sequences first, …, first + count - 1 of the run; numbers are global over all ranks."""
        places = self.schedule.sequences_of(first, count)
        arrays = _empty_batch(count, self.sequence_length, self._end_token)
        located = sorted((name, *self.streams[name].locate(rank), row) for row, (name, rank) in enumerate(places))
        for (name, epoch, shard), members in groupby(located, key=lambda place: place[:3]):
            sequences, rows = zip(*(place[3:] for place in members), strict=True)
            _fill(arrays, rows, *self.streams[name].packed(epoch, shard), sequences)
        indices = {name: index for index, name in enumerate(self.names)}
        return Batch(
            {field: torch.from_numpy(array) for field, array in arrays.items()},
            torch.tensor([indices[name] for name, _ in places]),
        )


def _fill(
    arrays: dict[str, IntArray],
    rows: Sequence[int],
    documents: ShardDocuments,
    packing: Packing,
    sequences: Sequence[int],
) -> None:
    """Writes sequences [S] of one shard, by their indices in the packing, into rows [S] of the arrays [B, T]."""
    sequence_length = arrays["input_ids"].shape[1]
    slices = [packing.pieces(sequence) for sequence in sequences]
    num_pieces = np.array([piece.stop - piece.start for piece in slices])
    chosen = np.concatenate([np.arange(piece.start, piece.stop) for piece in slices])
    document, start, length = (values[chosen] for values in (packing.document, packing.start, packing.length))
    # All pieces are laid out in one flat array; `begin` is a piece's offset in it, and `place` shifts each sequence to
    # the offset of its row in the flattened [B, T] arrays.
    begin = np.cumsum(length) - length
    first_piece = np.cumsum(num_pieces) - num_pieces
    place = np.array(rows) * sequence_length - begin[first_piece]
    spread = _Spread(begin, length)
    target = spread(np.repeat(place, num_pieces)) + spread.index
    token = spread(documents.starts[document] + start - begin) + spread.index
    document_end = spread((documents.starts + documents.lengths)[document])
    arrays["input_ids"].reshape(-1)[target] = documents.shard.tokens[token]
    arrays["position_ids"].reshape(-1)[target] = spread.index - spread(begin)
    arrays["labels"].reshape(-1)[target] = _labels(documents.shard, token, document_end)


def read_sequence(stream: TrainingStream, rank: int) -> tuple[PackedSequence, int]:
    """One training sequence of one source, and the number of its positions that hold tokens."""
    epoch, shard, number = stream.locate(rank)
    documents, packing = stream.packed(epoch, shard)
    arrays = _empty_batch(1, stream.sequence_length, stream.source.info.end_token)
    _fill(arrays, [0], documents, packing, [number])
    sequence = PackedSequence(stream.source.name, **{field: array[0] for field, array in arrays.items()})
    return sequence, int(packing.length[packing.pieces(number)].sum())


class _Spread:
    """Expands an array with one value per piece to one value per token."""

    def __init__(self, begin: IntArray, length: IntArray) -> None:
        self._length = length
        self.index = np.arange(int(begin[-1] + length[-1]))

    def __call__(self, values: IntArray) -> IntArray:
        return np.repeat(values, self._length)


def _labels(shard: Shard, token: IntArray, document_end: IntArray) -> IntArray:
    """The next token of the same document, or NO_LOSS if there is none or it carries no loss."""
    following = token + 1
    inside = following < document_end
    following = np.where(inside, following, token)
    carries_loss = inside if shard.loss is None else inside & (shard.loss[following] != 0)
    return np.where(carries_loss, shard.tokens[following].astype(np.int64), NO_LOSS)


def _empty_batch(num_sequences: int, sequence_length: int, end_token: int) -> dict[str, IntArray]:
    """Sequences of padding only, which `_fill` overwrites.

    The remaining padding at the end of a sequence has position 0 throughout, so attention does not connect it with the
    documents, and it carries no loss.
    """
    shape = (num_sequences, sequence_length)
    return {
        "input_ids": np.full(shape, end_token, dtype=np.int64),
        "position_ids": np.zeros(shape, dtype=np.int64),
        "labels": np.full(shape, NO_LOSS, dtype=np.int64),
    }


def collate(sequences: Sequence[PackedSequence]) -> dict[str, torch.Tensor]:
    """Stacks sequences of equal length into `input_ids`, `position_ids` and `labels`. [B, T] int64 each"""
    return {field: torch.from_numpy(np.stack([getattr(sequence, field) for sequence in sequences])) for field in FIELDS}


def held_out_sequences(source: TokenizedSource, sequence_length: int, num_sequences: int) -> list[PackedSequence]:
    """Complete sequences of a source's held-out documents, spread evenly over those that the run reads.

    Returns:
        `num_sequences` sequences, or fewer if the source has fewer complete ones.

    Raises:
        MixtureError: If the held-out documents do not fill one sequence.
    """
    num_tokens = source.num_held_out_tokens
    whole = num_tokens // sequence_length
    if whole == 0:
        raise MixtureError(
            f"Source {source.name!r} holds out {num_tokens} token(s), less than one sequence of {sequence_length}.",
            next_step="Raise mixture.validation_fraction, add documents, or lower training.sequence_length.",
        )
    taken = min(num_sequences, whole)
    starts = (number * whole // taken * sequence_length for number in range(taken))
    spans = ((start, start + sequence_length) for start in starts)
    return cut_sequences(source.name, source.held_out_documents(), spans)


def cut_sequences(
    name: str, documents: Sequence[ShardDocuments], spans: Iterable[tuple[int, int]]
) -> list[PackedSequence]:
    """Cuts sequences from concatenated documents: from the first token of each span to one before its end."""
    parts: dict[str, list[IntArray]] = {field: [] for field in FIELDS}
    for part in documents:
        begin = np.cumsum(part.lengths) - part.lengths
        spread = _Spread(begin, part.lengths)
        token = spread(part.starts - begin) + spread.index
        document_end = spread(part.starts + part.lengths)
        parts["input_ids"].append(part.shard.tokens[token].astype(np.int64))
        parts["position_ids"].append(spread.index - spread(begin))
        parts["labels"].append(_labels(part.shard, token, document_end))
    row = {field: np.concatenate(arrays) for field, arrays in parts.items()}
    sequences = []
    for start, stop in spans:
        fields = {field: array[start:stop] for field, array in row.items()}
        # A document that started before the sequence has position 0 at the start of the sequence.
        offset = np.arange(stop - start)
        fields["position_ids"] = np.minimum(fields["position_ids"], offset)
        sequences.append(PackedSequence(name, **fields))
    return sequences
