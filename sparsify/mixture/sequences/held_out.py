"""Sequences to measure on: from a text file, or from what a mixture holds out of training.

Sequences to calibrate a conversion on, and others to watch it with.
"""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import MixtureError, nearest
from sparsify.mixture.sequences.reader import (
    PackedSequence,
    cut_sequences,
    held_out_sequences,
    read_sequence,
)
from sparsify.mixture.sequences.shares import token_shares
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.read import file_documents
from sparsify.mixture.sources.source_files import check_format, look_at
from sparsify.mixture.tokens.encoder import Encoder, Tokenizer, check_tokenizer
from sparsify.mixture.tokens.ingest import (
    Progress,
    mixture_ingests,
    text_documents,
)
from sparsify.recipe.catalogue import YAML, mixture_names
from sparsify.recipe.compose import load_mixture
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.source import SourceSection


def sequences_from(
    text_or_mixture: str,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    sequence_length: int,
    cache_dir: Path,
) -> tuple[list[PackedSequence], str]:
    """Sequences to measure a model on.

    Args:
        text_or_mixture: Path of plain text or .jsonl (column `text`), plain or .gz; or a mixture's name or YAML path.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens wanted; fewer come if there are fewer.
        sequence_length: Length of a sequence. Only the last one of a text file may be shorter.
        cache_dir: Where tokenised sources are kept.

    Returns:
        The sequences, and a phrase that says what they are.

    Raises:
        MixtureError: If it is neither a file nor a mixture, or holds no text.
        RecipeError: If the mixture cannot be drawn.
    """
    check_text_or_mixture(text_or_mixture)
    path = Path(text_or_mixture).expanduser()
    if path.suffix not in YAML and path.is_file():
        return _text_sequences(path, tokenizer, num_tokens, sequence_length)
    mixture = load_mixture(text_or_mixture)
    sequences = mixture_sequences(
        mixture,
        tokenizer,
        num_tokens=num_tokens,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    return sequences, f"held-out sequences of mixture {mixture.name}"


def check_text_or_mixture(text_or_mixture: str) -> None:
    """Refuses what is neither a file nor a mixture's name, before anything is done for it.

    Raises:
        MixtureError: With the nearest name.
    """
    if Path(text_or_mixture).expanduser().is_file() or text_or_mixture in mixture_names():
        return
    raise MixtureError(
        f"{text_or_mixture!r} is neither a file nor a mixture.",
        allowed=f"{nearest(text_or_mixture, mixture_names())}Mixtures: {', '.join(mixture_names()) or 'none'}; "
        "or the path of a text file (.txt or .jsonl, plain or .gz) or of a mixture's YAML file.",
        next_step="Check the spelling, and the folder that the command runs in.",
    )


def mixture_sequences(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    sequence_length: int,
    cache_dir: Path,
) -> list[PackedSequence]:
    """Held-out sequences of every source of a mixture, in proportion to the token shares.

    Each source gives at least one sequence, so that a rare one is measured too.

    Raises:
        MixtureError: If a source has no whole held-out sequence.
    """
    wanted = {
        name: max(1, round(num_tokens * share / sequence_length))
        for name, share in token_shares(mixture).items()
    }
    return _held_out(mixture, tokenizer, wanted, sequence_length, cache_dir)


def source_sequences(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    sequences_per_source: int,
    sequence_length: int,
    cache_dir: Path,
) -> list[PackedSequence]:
    """Held-out sequences of every source of a mixture, as many of each, source after source.

    Raises:
        MixtureError: If a source has no whole held-out sequence.
    """
    wanted = dict.fromkeys(token_shares(mixture), sequences_per_source)
    return _held_out(mixture, tokenizer, wanted, sequence_length, cache_dir)


def _held_out(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    wanted: dict[str, int],
    sequence_length: int,
    cache_dir: Path,
) -> list[PackedSequence]:
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens=dict.fromkeys(wanted, 1),
        held_out_tokens=max(wanted.values()) * sequence_length,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    return [
        sequence
        for name, num_sequences in wanted.items()
        for sequence in held_out_sequences(ingests[name].run(), sequence_length, num_sequences)
    ]


def _text_sequences(
    path: Path, tokenizer: Tokenizer, num_tokens: int, sequence_length: int
) -> tuple[list[PackedSequence], str]:
    check_tokenizer(tokenizer)
    bad_rows = BadRows(path.name, MixtureSection.max_bad_fraction)
    encoder = Encoder(path.name, tokenizer, responses_only=False, bad_rows=bad_rows)
    file, pretraining = look_at(path), SourceSection(token_share=1.0)
    check_format(path.name, file, pretraining)
    text = text_documents(file_documents(file, pretraining, bad_rows), encoder, num_tokens)
    if not len(text.lengths):
        raise MixtureError(
            "\n".join([f"{path} holds no text.", *bad_rows.lines()]),
            next_step="Choose a file with at least one document.",
        )
    bad_rows.check()
    stop = min(num_tokens, int(text.lengths.sum()))
    starts = range(0, stop, sequence_length)
    spans = ((start, min(start + sequence_length, stop)) for start in starts)
    said = bad_rows.summary() if bad_rows.num_bad_rows else path.name
    return cut_sequences(path.name, [text], spans), said


Watched = dict[str, list[PackedSequence]]
"""Sequences that take no part in a calibration, by source."""
WATCHED_SHARE = 0.25
"""Of a text too short for both, at most so much is only watched."""


def mixture_calibration(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    watched_sequences: int,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> tuple[list[PackedSequence], Watched]:
    """The first training sequences of every source of a mixture, in proportion to the token shares, and held-out ones.

    Args:
        mixture: The sources.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens to calibrate on. Each source gives at least one sequence.
        watched_sequences: Held-out sequences of each source.
        sequence_length: Length of a sequence.
        seed: Decides the order of training sequences.
        cache_dir: Where tokenised sources are kept.
        on_progress: Told how far tokenising is.

    Raises:
        MixtureError: If a source has no whole held-out sequence.
    """
    wanted = {
        name: max(1, round(num_tokens * share / sequence_length))
        for name, share in token_shares(mixture).items()
    }
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens={name: count * sequence_length for name, count in wanted.items()},
        held_out_tokens=watched_sequences * sequence_length,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    sequences: list[PackedSequence] = []
    watched: Watched = {}
    for name, count in wanted.items():
        source = ingests[name].run(on_progress)
        stream = TrainingStream(source, sequence_length, seed)
        sequences += [
            read_sequence(stream, rank)[0] for rank in range(min(count, stream.num_sequences))
        ]
        watched[name] = held_out_sequences(source, sequence_length, watched_sequences)
    return sequences, watched


def text_or_mixture_calibration(
    text_or_mixture: str,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    watched_tokens: int,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
) -> tuple[list[PackedSequence], Watched]:
    """Sequences of a text file, or of a mixture.

    Args:
        text_or_mixture: Path of plain text or .jsonl, plain or .gz; or a mixture's name or YAML path.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens to calibrate on; fewer come if the text has fewer.
        watched_tokens: Tokens to watch with: of a text the last ones, of a mixture held-out ones.
        sequence_length: Length of a sequence.
        seed: Decides the order of a mixture's training sequences.
        cache_dir: Where tokenised sources are kept.

    Raises:
        MixtureError: If it is neither a file nor a mixture, or too short.
    """
    check_text_or_mixture(text_or_mixture)
    path = Path(text_or_mixture).expanduser()
    if path.suffix in YAML or not path.is_file():
        mixture = load_mixture(text_or_mixture)
        each = max(1, watched_tokens // sequence_length // len(token_shares(mixture)))
        return mixture_calibration(
            mixture,
            tokenizer,
            num_tokens=num_tokens,
            watched_sequences=each,
            sequence_length=sequence_length,
            seed=seed,
            cache_dir=cache_dir,
        )
    sequences, _ = sequences_from(
        text_or_mixture,
        tokenizer,
        num_tokens=num_tokens + watched_tokens,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    whole = [sequence for sequence in sequences if len(sequence.input_ids) == sequence_length]
    left = len(whole) - num_tokens // sequence_length
    num_watched = min(watched_tokens // sequence_length, max(left, int(len(whole) * WATCHED_SHARE)))
    if num_watched < 1:
        raise MixtureError(
            f"{path} holds {len(whole)} sequence(s) of {sequence_length} tokens.",
            allowed=f"At least {int(1 / WATCHED_SHARE)}: some to calibrate on, some to see what came of it.",
            next_step="Give a longer text.",
        )
    return whole[:-num_watched], {path.name: whole[-num_watched:]}
