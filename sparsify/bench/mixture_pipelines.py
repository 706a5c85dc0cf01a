"""The two data pipelines of the benchmark, and the audit of what each delivers and what a resume changes.

Ours uses the same parts as training. `datasets.interleave_datasets` is used as in its documentation and in the examples of
transformers: one streamed JSON dataset per source, a shuffle buffer, `interleave_datasets` with probabilities, then a batched
map that tokenises, joins the texts and cuts them into sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.bench.corpus import Corpus
from sparsify.bench.mixture_report import Delivered, Resumed
from sparsify.errors import MixtureError
from sparsify.mixture.sequences.reader import SequenceReader
from sparsify.mixture.sequences.schedule import Anchor, SourceSchedule
from sparsify.mixture.sequences.shares import Shares
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import Ingest, mixture_ingests
from sparsify.mixture.tokens.tokenized_source import TokenizedSource

GLOBAL_BATCH_SIZE = 8
MAX_PERIOD_SEQUENCES = 10**10

Piece = tuple[str, int, int, int]
"""(source, shard, document in the shard, first token); a document longer than a sequence has several pieces."""


@dataclass(frozen=True)
class Ours:
    """Our pipeline over the corpus; the budget limits how much of each source is read."""

    corpus: Corpus
    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    budget_tokens: int

    @property
    def shares(self) -> Shares:
        return Shares.constant(self.corpus.shares)

    def anchor(self, sequence: int) -> Anchor:
        """The schedule's state in a checkpoint at this sequence, from which a resumed run continues without recounting."""
        return SourceSchedule(self.shares).anchor(sequence)

    def far_sequence(self, num_tokens: int, sequence_length: int) -> int | None:
        """A sequence at least `num_tokens` into a run whose schedule is known without counting up to it.

        Returns:
            A sequence at which all shares are met exactly; None if the period of the shares is too long.
        """
        period = self.shares.period
        if period is None or period > MAX_PERIOD_SEQUENCES:
            return None
        return -(-num_tokens // (sequence_length * period)) * period

    def ingests(self, cache_dir: Path) -> dict[str, Ingest]:
        return mixture_ingests(
            self.corpus.mixture,
            self.tokenizer,
            train_tokens={
                name: math.ceil(self.budget_tokens * share) + self.sequence_length
                for name, share in self.corpus.shares.items()
            },
            held_out_tokens=self.sequence_length,
            sequence_length=self.sequence_length,
            cache_dir=cache_dir,
        )

    def tokenize(self, cache_dir: Path) -> dict[str, TokenizedSource]:
        return {name: ingest.run() for name, ingest in self.ingests(cache_dir).items()}

    def reader(
        self, cache_dir: Path, sequence_length: int | None = None, anchor: Anchor | None = None
    ) -> SequenceReader:
        """Opens a filled cache, like a process that starts or resumes a run."""
        sources = {name: ingest.open() for name, ingest in self.ingests(cache_dir).items()}
        size = sequence_length or self.sequence_length
        return SequenceReader(sources, SourceSchedule(self.shares, anchor), size, self.seed)


def draw_ours(reader: SequenceReader, first: int, count: int) -> None:
    for start in range(first, first + count, GLOBAL_BATCH_SIZE):
        reader.batch(start, min(GLOBAL_BATCH_SIZE, first + count - start))


def pieces_of(reader: SequenceReader, index: int) -> list[tuple[Piece, int, bool]]:
    """Every piece of a sequence, its number of tokens, and whether it was cut off a document shorter than a sequence."""
    name, rank = reader.schedule.locate(index)
    stream = reader.streams[name]
    epoch, shard, sequence = stream.locate(rank)
    documents, packing = stream.packed(epoch, shard)
    piece = packing.pieces(sequence)
    columns = (packing.document[piece], packing.start[piece], packing.length[piece])
    found = []
    for document, start, length in np.stack(columns, axis=1).tolist():
        whole = int(documents.lengths[document])
        is_cut = length < whole <= reader.sequence_length
        found.append(((name, shard, document, start), length, is_cut))
    return found


def tokens_in(sources: dict[str, TokenizedSource]) -> int:
    records = (record for source in sources.values() for record in source.cache.records)
    return sum(record.train_tokens + record.held_out_tokens for record in records)


MAP_DOCUMENTS = 100
"""A tenth of the default, with which a thousand documents would be tokenised before the first sequence."""

FIELDS = ("input_ids", "labels")

Row = dict[str, Any]


@dataclass(frozen=True)
class Interleaved:
    """The pipeline with `interleave_datasets` over the corpus.

    Args:
        tokenizer: The same tokenizer as ours.
        buffer_documents: Documents in each source's shuffle buffer.
        probabilities: Probability of each source; usually set to the planned token shares.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    buffer_documents: int
    probabilities: Mapping[str, float]

    def dataset(self, *, tracked: bool = False) -> datasets.IterableDataset:
        """The whole pipeline; `tracked` adds a column with the document of every token."""
        sources = [
            datasets.load_dataset("json", data_files=[*map(str, paths)], split="train", streaming=True)
            for paths in self.corpus.paths.values()
        ]
        mixed: Any = datasets.interleave_datasets(
            [source.shuffle(seed=self.seed, buffer_size=self.buffer_documents) for source in sources],  # pyright: ignore
            probabilities=[self.probabilities[name] for name in self.corpus.paths],
            seed=self.seed,
            stopping_strategy="all_exhausted",
        )
        return mixed.map(
            self._sequences,
            batched=True,
            batch_size=MAP_DOCUMENTS,
            fn_kwargs={"tracked": tracked},
            remove_columns=["text", "document"],
        )

    def _sequences(self, rows: Row, tracked: bool) -> Row:
        """Tokenises and joins texts, and drops the incomplete last sequence, like `group_texts` of run_clm.py."""
        end, size = self.tokenizer.eos_token, self.sequence_length
        encoded = self.tokenizer([text + end for text in rows["text"]])["input_ids"]
        joined = {"input_ids": list(chain(*encoded))}
        if tracked:
            numbered = zip(rows["document"], encoded, strict=True)
            joined["documents"] = [document for document, ids in numbered for _ in ids]
        stop = len(joined["input_ids"]) // size * size
        cut = {
            column: [values[start : start + size] for start in range(0, stop, size)]
            for column, values in joined.items()
        }
        return cut | {"labels": [ids.copy() for ids in cut["input_ids"]]}


def take(rows: Iterator[Row], num_sequences: int) -> list[NDArray[np.int64]]:
    """The document of every token of the next sequences, [tokens] each.

    Raises:
        MixtureError: If the stream ends too early.
    """
    taken = [np.array(row["documents"]) for row in islice(rows, num_sequences)]
    _check_enough(len(taken), num_sequences)
    return taken


def draw_interleaved(rows: Iterator[Row], num_sequences: int) -> None:
    """Draws sequences as tensors, like training."""
    drawn = 0
    for row in islice(rows, num_sequences):
        # Like transformers' collator: with_format("torch") is several times slower for lists.
        for field in FIELDS:
            torch.tensor(row[field])
        drawn += 1
    _check_enough(drawn, num_sequences)


def _check_enough(drawn: int, wanted: int) -> None:
    if drawn < wanted:
        raise MixtureError(
            f"interleave_datasets ended after {drawn} of {wanted} sequences, with every source exhausted.",
            next_step="Lower --budget-tokens, or use a mixture with more text.",
        )


IntArray = NDArray[np.int64]
State = dict[str, Any]
"""State of an IterableDataset."""


def count_ours(side: Ours, cache_dir: Path, num_sequences: int, *, stop: int) -> tuple[Delivered, Resumed]:
    """Audits our pipeline: uninterrupted, and resumed after `stop` sequences."""
    reader = side.reader(cache_dir)
    delivered = _deliver_ours(reader, side.corpus.shares, num_sequences)
    whole = _pieces(reader, 0, num_sequences)
    before = _pieces(side.reader(cache_dir), 0, stop)
    after = _pieces(side.reader(cache_dir), stop, num_sequences)
    return delivered, _count_resumed(whole, before + after)


def count_interleaved(
    side: Interleaved, num_sequences: int, *, stop: int, late: int
) -> tuple[tuple[Delivered, Resumed], State]:
    """Audits interleave_datasets in the same way; also returns its state after `late` sequences."""
    dataset = side.dataset(tracked=True)
    rows = iter(dataset)
    before = take(rows, stop)
    stopped = dataset.state_dict()
    middle = take(rows, late - stop)
    late_state = dataset.state_dict()
    sequences = before + middle + take(rows, num_sequences - late)
    dataset = side.dataset(tracked=True)
    dataset.load_state_dict(stopped)
    resumed = before + take(iter(dataset), num_sequences - stop)
    delivered = _deliver_interleaved(sequences, side.corpus)
    return (delivered, _count_resumed(_documents(sequences), _documents(resumed))), late_state


def count_by_length(side: Interleaved, sources: Mapping[str, TokenizedSource], num_sequences: int) -> Delivered:
    """Audits interleave_datasets with the probabilities that give the planned token shares on average."""
    weights = {}
    for name, source in sources.items():
        num_documents = sum(record.num_documents for record in source.cache.records)
        weights[name] = side.corpus.shares[name] * num_documents / tokens_in({name: source})
    total = sum(weights.values())
    weighed = replace(side, probabilities={name: one / total for name, one in weights.items()})
    sequences = take(iter(weighed.dataset(tracked=True)), num_sequences)
    return _deliver_interleaved(sequences, side.corpus)


def _count_resumed(whole: Counter[Hashable], resumed: Counter[Hashable]) -> Resumed:
    """Compares the documents of a resumed run with those of the same run without interruption."""
    # Repetitions over several epochs are not caused by the resume.
    repeated = sum(max(0, count - max(whole[one], 1)) for one, count in resumed.items())
    return Resumed(documents=whole.total(), lost=(whole - resumed).total(), repeated=repeated)


def _pieces(reader: SequenceReader, first: int, stop: int) -> Counter[Hashable]:
    """Occurrences of each piece in our sequences first, …, stop - 1."""
    return Counter(piece for index in range(first, stop) for piece, _, _ in pieces_of(reader, index))


def _deliver_ours(reader: SequenceReader, shares: Mapping[str, float], num_sequences: int) -> Delivered:
    given = np.zeros((num_sequences, len(shares)))
    names = list(shares)
    text_tokens = num_cut = 0
    for index in range(num_sequences):
        given[index, names.index(reader.schedule.locate(index)[0])] = 1.0
        for _, length, is_cut in pieces_of(reader, index):
            text_tokens += length
            num_cut += is_cut
    positions = num_sequences * reader.sequence_length
    return _delivered(given, shares, text_tokens / positions, num_cut)


def _deliver_interleaved(sequences: Sequence[IntArray], corpus: Corpus) -> Delivered:
    """Audits sequences of interleave_datasets, given the document of each of their tokens.

    Documents that end at a sequence's end because `group_texts` dropped the remainder are not counted as cut.
    """
    # The corpus numbers documents source by source.
    firsts = list(corpus.first_document.values())
    given = np.zeros((len(sequences), len(firsts)))
    for index, documents in enumerate(sequences):
        source = np.searchsorted(firsts, documents, side="right") - 1
        given[index] = np.bincount(source, minlength=len(firsts)) / len(documents)
    starts, lengths = _runs(np.concatenate(sequences))
    size = len(sequences[0])
    is_cut = (starts // size != (starts + lengths - 1) // size) & (lengths <= size)
    return _delivered(given, corpus.shares, 1.0, int(is_cut.sum()))


def _documents(sequences: Sequence[IntArray]) -> Counter[Hashable]:
    tokens = np.concatenate(sequences)
    return Counter(tokens[_runs(tokens)[0]].tolist())


def _runs(values: IntArray) -> tuple[IntArray, IntArray]:
    """Start and length of every run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return starts, np.diff(starts, append=len(values))


def _delivered(
    given: NDArray[np.float64], shares: Mapping[str, float], text_positions: float, num_cut: int
) -> Delivered:
    """The audit, from the share of each sequence that each source got, [sequences, sources]."""
    num_sequences = np.arange(1, len(given) + 1)[:, None]
    deviation = np.abs(np.cumsum(given, axis=0) - num_sequences * np.array(list(shares.values())))
    return Delivered(
        token_shares=dict(zip(shares, given.mean(axis=0).tolist(), strict=True)),
        largest_deviation_sequences=float(deviation.max()),
        text_positions=text_positions,
        cut_documents=num_cut,
    )
