"""`sparsify mixture`: mixtures by name, looked at with a tokenizer before any training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from sparsify.conversion.source import locate
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.mixture.inspection import (
    MixtureStats,
    SequencePreview,
    measure_mixture,
    open_mixture,
    preview_sequences,
)
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.recipe.compose import load_mixture
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.training import TrainingSection

logger = logging.getLogger(__name__)

LEAST_SEQUENCES = 64
"""Sequences are only packed as in training among enough of their like."""


def preview(
    name_or_path: str, tokenizer_from: str, num_sequences: int, sequence_length: int
) -> Iterator[SequencePreview]:
    """The first training sequences of every source of a mixture, for the default seed.

    Args:
        name_or_path: Mixture name or path of a YAML file.
        tokenizer_from: Folder, Hub id or package:NAME/PATH that has the tokenizer.
        num_sequences: Sequences of each source.
        sequence_length: Length of a sequence.
    """
    mixture, tokenizer = _named(name_or_path, tokenizer_from)
    # Each source as if it were all of the budget: a rare one is to be seen as well.
    sources = open_mixture(
        mixture,
        tokenizer,
        train_tokens=dict.fromkeys(
            mixture.sources, max(num_sequences, LEAST_SEQUENCES) * sequence_length
        ),
        sequence_length=sequence_length,
        cache_dir=Path(Recipe().cache_dir),
        on_progress=ingest_progress(),
    )
    for source in sources.values():
        yield from preview_sequences(
            source,
            tokenizer,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            seed=TrainingSection().seed,
        )


def stats(
    name_or_path: str, tokenizer_from: str, budget_tokens: int, sequence_length: int
) -> MixtureStats:
    """Sizes of a mixture as far as a budget reads it.

    Args:
        name_or_path: Mixture name or path of a YAML file.
        tokenizer_from: Folder, Hub id or package:NAME/PATH that has the tokenizer.
        budget_tokens: Training tokens over all sources.
        sequence_length: Length of a sequence.
    """
    mixture, tokenizer = _named(name_or_path, tokenizer_from)
    return measure_mixture(
        mixture,
        tokenizer,
        budget_tokens=budget_tokens,
        sequence_length=sequence_length,
        cache_dir=Path(Recipe().cache_dir),
        on_progress=ingest_progress(),
    )


def ingest_progress() -> Callable[[str, int, int], None]:
    """Returns a function that logs how far each source is, a tenth at a time."""
    last: dict[str, int] = {}

    def progress(source: str, tokens: int, needed_tokens: int) -> None:
        tenth = 10 * tokens // max(needed_tokens, 1)
        if tenth > last.get(source, 0):
            last[source] = tenth
            # The last batch of documents is read whole, however long they are.
            of_need = f" of {needed_tokens:,}" if tokens < needed_tokens else ""
            logger.info(f"Tokenising {source}: {tokens:,}{of_need} tokens")

    return progress


def _named(name_or_path: str, tokenizer_from: str) -> tuple[MixtureSection, Tokenizer]:
    mixture = load_mixture(name_or_path)
    return mixture, load_tokenizer(locate(tokenizer_from), tokenizer_from)
