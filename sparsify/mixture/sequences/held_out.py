"""Sequences for evaluation and calibration, from a text file or a mixture.

Evaluation uses the held-out documents of a mixture. Calibration uses training sequences, and held-out ones to validate
its result.
"""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import MixtureError, nearest
from sparsify.metadata import user_path
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
from sparsify.mixture.sources.source_files import check_format, file_state
from sparsify.mixture.tokens.encoder import Encoder, Tokenizer, check_tokenizer
from sparsify.mixture.tokens.ingest import Progress, mixture_ingests, text_documents
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
    """Sequences to evaluate a model on, fewer than `num_tokens` if there are fewer, and a phrase that describes them.
    Only the last one of a text file may be shorter. Raises MixtureError if the argument is neither a file nor a
    mixture, or holds no text.
    """
    check_text_or_mixture(text_or_mixture)
    path = user_path(text_or_mixture)
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
    """Raises MixtureError, naming the most similar mixture, if the argument is neither a file nor a mixture."""
    if user_path(text_or_mixture).is_file() or text_or_mixture in mixture_names():
        return
    raise MixtureError(
        f"{text_or_mixture!r} is neither a file nor a mixture.",
        allowed=f"{nearest(text_or_mixture, mixture_names())}Mixtures: {', '.join(mixture_names()) or 'none'}; "
        "or the path of a text file (.txt or .jsonl, plain or .gz) or of a mixture's YAML file.",
        next_step="Check the spelling, and the folder in which you run the command.",
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

    Each source gives at least one sequence, so that rare sources are evaluated too.
    """
    wanted = {
        name: max(1, round(num_tokens * share / sequence_length)) for name, share in token_shares(mixture).items()
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
    """Held-out sequences of every source of a mixture: `sequences_per_source` of each, source after source.

    Raises:
        MixtureError: If a source has no complete held-out sequence.
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
    file, pretraining = file_state(path), SourceSection(token_share=1.0)
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
    description = bad_rows.summary() if bad_rows.num_bad_rows else path.name
    return cut_sequences(path.name, [text], spans), description


ValidationSequences = dict[str, list[PackedSequence]]
"""Sequences by source that validate a calibration and are not used by it."""
MAX_VALIDATION_SHARE = 0.25
"""Largest share of validation sequences of a text that is too short for both."""


def mixture_calibration(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    validation_sequences: int,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> tuple[list[PackedSequence], ValidationSequences]:
    """Calibration sequences of a mixture, and held-out ones of each source to validate with. Calibration uses the first
    training sequences of every source, in proportion to the token shares, at least one of each. Raises MixtureError if
    a source has no complete held-out sequence.
    """
    wanted = {
        name: max(1, round(num_tokens * share / sequence_length)) for name, share in token_shares(mixture).items()
    }
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens={name: count * sequence_length for name, count in wanted.items()},
        held_out_tokens=validation_sequences * sequence_length,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    sequences: list[PackedSequence] = []
    validation: ValidationSequences = {}
    for name, count in wanted.items():
        source = ingests[name].run(on_progress)
        stream = TrainingStream(source, sequence_length, seed)
        sequences += [read_sequence(stream, rank)[0] for rank in range(min(count, stream.num_sequences))]
        validation[name] = held_out_sequences(source, sequence_length, validation_sequences)
    return sequences, validation


def text_or_mixture_calibration(
    text_or_mixture: str,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    validation_tokens: int,
    sequence_length: int,
    seed: int,
    cache_dir: Path,
) -> tuple[list[PackedSequence], ValidationSequences]:
    """Calibration and validation sequences of a text file or of a mixture; a text is validated on its last tokens.
    Raises MixtureError if it is neither a file nor a mixture, or too short.
    """
    check_text_or_mixture(text_or_mixture)
    path = user_path(text_or_mixture)
    if path.suffix in YAML or not path.is_file():
        mixture = load_mixture(text_or_mixture)
        each = max(1, validation_tokens // sequence_length // len(token_shares(mixture)))
        return mixture_calibration(
            mixture,
            tokenizer,
            num_tokens=num_tokens,
            validation_sequences=each,
            sequence_length=sequence_length,
            seed=seed,
            cache_dir=cache_dir,
        )
    sequences, _ = sequences_from(
        text_or_mixture,
        tokenizer,
        num_tokens=num_tokens + validation_tokens,
        sequence_length=sequence_length,
        cache_dir=cache_dir,
    )
    whole = [sequence for sequence in sequences if len(sequence.input_ids) == sequence_length]
    remaining = len(whole) - num_tokens // sequence_length
    num_validation = min(
        validation_tokens // sequence_length,
        max(remaining, int(len(whole) * MAX_VALIDATION_SHARE)),
    )
    if num_validation < 1:
        raise MixtureError(
            f"{path} holds {len(whole)} sequence(s) of {sequence_length} tokens.",
            allowed=f"At least {int(1 / MAX_VALIDATION_SHARE)}: for calibration and for its validation.",
            next_step="Use a longer text.",
        )
    return whole[:-num_validation], {path.name: whole[-num_validation:]}
