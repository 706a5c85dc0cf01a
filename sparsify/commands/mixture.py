"""`sparsify mixture`: previews and statistics of mixtures before training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from sparsify.conversion.source_checkpoint import locate
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
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.recipe.training import SEED
from sparsify.reporting.numbers import share
from sparsify.reporting.tables import Table

logger = logging.getLogger(__name__)

NO_LOSS_BRACKETS = "⟦", "⟧"
LEAST_SEQUENCES = 64
"""Fewer sequences would be packed less densely than in training."""


def preview(
    name_or_path: str, tokenizer_from: str, num_sequences: int, sequence_length: int
) -> Iterator[SequencePreview]:
    """The first training sequences of every source of a mixture, for the default seed."""
    mixture, tokenizer = _named(name_or_path, tokenizer_from)
    # Each source gets the whole budget, so that a rare one is shown too.
    sources = open_mixture(
        mixture,
        tokenizer,
        train_tokens=dict.fromkeys(mixture.sources, max(num_sequences, LEAST_SEQUENCES) * sequence_length),
        sequence_length=sequence_length,
        cache_dir=Path(CACHE_DIR),
        on_progress=ingest_progress(),
    )
    for source in sources.values():
        yield from preview_sequences(
            source,
            tokenizer,
            sequence_length=sequence_length,
            num_sequences=num_sequences,
            seed=SEED,
        )


def stats(name_or_path: str, tokenizer_from: str, budget_tokens: int, sequence_length: int) -> MixtureStats:
    """Sizes of the part of a mixture that a budget reads."""
    mixture, tokenizer = _named(name_or_path, tokenizer_from)
    return measure_mixture(
        mixture,
        tokenizer,
        budget_tokens=budget_tokens,
        sequence_length=sequence_length,
        cache_dir=Path(CACHE_DIR),
        on_progress=ingest_progress(),
    )


def ingest_progress() -> Callable[[str, int, int], None]:
    """Returns a function that logs how far each source is, a tenth at a time."""
    last: dict[str, int] = {}

    def progress(source: str, tokens: int, needed_tokens: int) -> None:
        tenth = 10 * tokens // max(needed_tokens, 1)
        if tenth > last.get(source, 0):
            last[source] = tenth
            # The last batch of documents is read completely, past the need.
            of_need = f" of {needed_tokens:,}" if tokens < needed_tokens else ""
            logger.info(f"Tokenising {source}: {tokens:,}{of_need} tokens")

    return progress


def _named(name_or_path: str, tokenizer_from: str) -> tuple[MixtureSection, Tokenizer]:
    mixture = load_mixture(name_or_path)
    return mixture, load_tokenizer(locate(tokenizer_from), tokenizer_from)


def mixture_table(stats: MixtureStats) -> RenderableType:
    table = Table(
        f"{stats.mixture}: {stats.budget_tokens:,} training tokens in sequences of {stats.sequence_length:,}",
        ["source", "documents", "tokens", "tokens each", "loss on", "full", "epochs"],
    )
    for name, source in stats.sources.items():
        more = "" if source.complete else "+"
        table.add(
            name,
            f"{source.documents:,}{more}",
            f"{source.tokens:,}{more}",
            f"{source.tokens_per_document_p50:,}–{source.tokens_per_document_p95:,}",
            share(source.loss_share),
            share(source.packing_efficiency),
            f"{source.epochs:.2f}",
        )
    notes = (
        "tokens each: half of the documents have at most the first number, 95% at most the second\n"
        "full: share of sequence positions that carry tokens after packing\n"
        "+ the source has more: it was read as far as the budget needs it"
    )
    dropped = [Text(note) for source in stats.sources.values() for note in source.dropped.notes]
    return Group("", table, Text(notes, style="dim"), *dropped)


def sequence_preview(sequence: SequencePreview, *, styled: bool) -> RenderableType:
    """One sequence with its documents between rules; tokens without loss are dim, or where nothing is `styled`, in brackets."""
    begin, end = ("", "") if styled else NO_LOSS_BRACKETS
    parts: list[RenderableType] = []
    for number, document in enumerate(sequence.documents, start=1):
        of = f"document {number} of {len(sequence.documents)} in this sequence"
        text = Text()
        for span in document:
            if span.carries_loss:
                text.append(span.text, style="default")
            else:
                text.append(f"{begin}{span.text}{end}", style="dim italic")
        parts += [Rule(Text(of, style="dim"), align="left", style="dim"), text]
    return Panel(
        Group(*parts),
        title=Text(f"{sequence.source}: {sequence.num_tokens:,} tokens, {sequence.num_empty:,} left empty"),
        subtitle=f"{'dim italic' if styled else f'{begin} {end}'}: no loss",
        title_align="left",
        subtitle_align="right",
    )
