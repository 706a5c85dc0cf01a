"""The other side: `datasets.interleave_datasets` as its documentation and the examples of transformers use it.

One streamed JSON dataset a source, a shuffle buffer, `interleave_datasets` with probabilities, then a batched map that tokenises,
joins the texts and cuts them into windows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import datasets
import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.benchmarks.corpus import Corpus
from sparsify.errors import MixtureError
from sparsify.mixture.encoding import Tokenizer

MAP_DOCUMENTS = 100
"""A tenth of the default: at that, a thousand documents are tokenised before the first window."""

FIELDS = ("input_ids", "labels")

Row = dict[str, Any]


@dataclass(frozen=True)
class Interleaved:
    """A pipeline over the corpus.

    Args:
        corpus: The files.
        tokenizer: The same as ours.
        window_tokens: Tokens of a window.
        seed: Of the shuffle buffers and of the draws.
        buffer_documents: Of each source's shuffle buffer.
        probabilities: How often each source is drawn; the asked token shares, as most write it.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    window_tokens: int
    seed: int
    buffer_documents: int
    probabilities: Mapping[str, float]

    def dataset(self, *, tracked: bool = False) -> datasets.IterableDataset:
        """The whole pipeline; `tracked` keeps the document of every token beside it."""
        sources = [
            datasets.load_dataset(
                "json", data_files=[*map(str, paths)], split="train", streaming=True
            )
            for paths in self.corpus.paths.values()
        ]
        mixed: Any = datasets.interleave_datasets(
            [
                source.shuffle(seed=self.seed, buffer_size=self.buffer_documents)
                for source in sources
            ],  # pyright: ignore
            probabilities=[self.probabilities[name] for name in self.corpus.paths],
            seed=self.seed,
            stopping_strategy="all_exhausted",
        )
        return mixed.map(
            self._windows,
            batched=True,
            batch_size=MAP_DOCUMENTS,
            fn_kwargs={"tracked": tracked},
            remove_columns=["text", "document"],
        )

    def _windows(self, rows: Row, tracked: bool) -> Row:
        """Tokenises texts, joins them, and drops what does not fill a window: `group_texts` of run_clm.py."""
        end, size = self.tokenizer.eos_token, self.window_tokens
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


def take(rows: Iterator[Row], num_windows: int) -> list[NDArray[np.int64]]:
    """Documents of the tokens of the next windows. [T] each

    Raises:
        MixtureError: If the stream ends before.
    """
    taken = [np.array(row["documents"]) for row in islice(rows, num_windows)]
    _check_enough(len(taken), num_windows)
    return taken


def draw(rows: Iterator[Row], num_windows: int) -> None:
    """Draws windows as tensors, as training would.

    Raises:
        MixtureError: If the stream ends before.
    """
    drawn = 0
    for row in islice(rows, num_windows):
        # By hand, as transformers' collator does: with_format("torch") takes several times as long for lists.
        for field in FIELDS:
            torch.tensor(row[field])
        drawn += 1
    _check_enough(drawn, num_windows)


def _check_enough(drawn: int, wanted: int) -> None:
    if drawn < wanted:
        raise MixtureError(
            f"interleave_datasets ended after {drawn} of {wanted} windows: it has exhausted every source once.",
            next_step="Lower --budget-tokens, or give a mixture with more text.",
        )
