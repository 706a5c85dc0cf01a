"""Windows to measure on: from a text file, or from what a mixture holds out of training.

Windows to calibrate a conversion on, and others to watch it with.
"""

from __future__ import annotations

from pathlib import Path

from sparsify.errors import MixtureError, nearest
from sparsify.mixture.sequences.reader import Window, cut_windows, held_out_windows, read_window
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
from sparsify.recipe.compose import YAML, load_mixture, mixture_names
from sparsify.recipe.recipe import MixtureSection, SourceSection, token_shares


def windows_from(
    text_or_mixture: str,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    window_tokens: int,
    cache_dir: Path,
) -> tuple[list[Window], str]:
    """Windows to measure a model on.

    Args:
        text_or_mixture: Path of plain text or .jsonl (column `text`), plain or .gz; or a mixture's name or YAML path.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens wanted; fewer come if there are fewer.
        window_tokens: Length of a window. Only the last one of a text file may be shorter.
        cache_dir: Where tokenised sources are kept.

    Returns:
        The windows, and a phrase that says what they are.

    Raises:
        MixtureError: If it is neither a file nor a mixture, or holds no text.
        RecipeError: If the mixture cannot be drawn.
    """
    check_text_or_mixture(text_or_mixture)
    path = Path(text_or_mixture).expanduser()
    if path.suffix not in YAML and path.is_file():
        return _text_windows(path, tokenizer, num_tokens, window_tokens)
    mixture = load_mixture(text_or_mixture)
    windows = mixture_windows(
        mixture,
        tokenizer,
        num_tokens=num_tokens,
        window_tokens=window_tokens,
        cache_dir=cache_dir,
    )
    return windows, f"held-out windows of mixture {mixture.name}"


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


def mixture_windows(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    window_tokens: int,
    cache_dir: Path,
) -> list[Window]:
    """Held-out windows of every source of a mixture, in proportion to the token shares.

    Each source gives at least one window, so that a rare one is measured too.

    Raises:
        MixtureError: If a source has no whole held-out window.
    """
    wanted = {
        name: max(1, round(num_tokens * share / window_tokens))
        for name, share in token_shares(mixture).items()
    }
    return _held_out(mixture, tokenizer, wanted, window_tokens, cache_dir)


def source_windows(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    windows_per_source: int,
    window_tokens: int,
    cache_dir: Path,
) -> list[Window]:
    """Held-out windows of every source of a mixture, as many of each, source after source.

    Raises:
        MixtureError: If a source has no whole held-out window.
    """
    wanted = dict.fromkeys(token_shares(mixture), windows_per_source)
    return _held_out(mixture, tokenizer, wanted, window_tokens, cache_dir)


def _held_out(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    wanted: dict[str, int],
    window_tokens: int,
    cache_dir: Path,
) -> list[Window]:
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens=dict.fromkeys(wanted, 1),
        held_out_tokens=max(wanted.values()) * window_tokens,
        window_tokens=window_tokens,
        cache_dir=cache_dir,
    )
    return [
        window
        for name, num_windows in wanted.items()
        for window in held_out_windows(ingests[name].run(), window_tokens, num_windows)
    ]


def _text_windows(
    path: Path, tokenizer: Tokenizer, num_tokens: int, window_tokens: int
) -> tuple[list[Window], str]:
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
    starts = range(0, stop, window_tokens)
    spans = ((start, min(start + window_tokens, stop)) for start in starts)
    said = bad_rows.summary() if bad_rows.num_bad_rows else path.name
    return cut_windows(path.name, [text], spans), said


Watched = dict[str, list[Window]]
"""Windows that take no part in a calibration, by source."""
WATCHED_SHARE = 0.25
"""Of a text too short for both, at most so much is only watched."""


def mixture_calibration(
    mixture: MixtureSection,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    watched_windows: int,
    window_tokens: int,
    seed: int,
    cache_dir: Path,
    on_progress: Progress | None = None,
) -> tuple[list[Window], Watched]:
    """The first training windows of every source of a mixture, in proportion to the token shares, and held-out ones.

    Args:
        mixture: The sources.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens to calibrate on. Each source gives at least one window.
        watched_windows: Held-out windows of each source.
        window_tokens: Length of a window.
        seed: Decides the order of training windows.
        cache_dir: Where tokenised sources are kept.
        on_progress: Told how far tokenising is.

    Raises:
        MixtureError: If a source has no whole held-out window.
    """
    wanted = {
        name: max(1, round(num_tokens * share / window_tokens))
        for name, share in token_shares(mixture).items()
    }
    ingests = mixture_ingests(
        mixture,
        tokenizer,
        train_tokens={name: count * window_tokens for name, count in wanted.items()},
        held_out_tokens=watched_windows * window_tokens,
        window_tokens=window_tokens,
        cache_dir=cache_dir,
    )
    windows: list[Window] = []
    watched: Watched = {}
    for name, count in wanted.items():
        source = ingests[name].run(on_progress)
        stream = TrainingStream(source, window_tokens, seed)
        windows += [read_window(stream, rank)[0] for rank in range(min(count, stream.num_windows))]
        watched[name] = held_out_windows(source, window_tokens, watched_windows)
    return windows, watched


def text_or_mixture_calibration(
    text_or_mixture: str,
    tokenizer: Tokenizer,
    *,
    num_tokens: int,
    watched_tokens: int,
    window_tokens: int,
    seed: int,
    cache_dir: Path,
) -> tuple[list[Window], Watched]:
    """Windows of a text file, or of a mixture.

    Args:
        text_or_mixture: Path of plain text or .jsonl, plain or .gz; or a mixture's name or YAML path.
        tokenizer: A fast Hugging Face tokenizer.
        num_tokens: Tokens to calibrate on; fewer come if the text has fewer.
        watched_tokens: Tokens to watch with: of a text the last ones, of a mixture held-out ones.
        window_tokens: Length of a window.
        seed: Decides the order of a mixture's training windows.
        cache_dir: Where tokenised sources are kept.

    Raises:
        MixtureError: If it is neither a file nor a mixture, or too short.
    """
    check_text_or_mixture(text_or_mixture)
    path = Path(text_or_mixture).expanduser()
    if path.suffix in YAML or not path.is_file():
        mixture = load_mixture(text_or_mixture)
        each = max(1, watched_tokens // window_tokens // len(token_shares(mixture)))
        return mixture_calibration(
            mixture,
            tokenizer,
            num_tokens=num_tokens,
            watched_windows=each,
            window_tokens=window_tokens,
            seed=seed,
            cache_dir=cache_dir,
        )
    windows, _ = windows_from(
        text_or_mixture,
        tokenizer,
        num_tokens=num_tokens + watched_tokens,
        window_tokens=window_tokens,
        cache_dir=cache_dir,
    )
    whole = [window for window in windows if len(window.input_ids) == window_tokens]
    left = len(whole) - num_tokens // window_tokens
    num_watched = min(watched_tokens // window_tokens, max(left, int(len(whole) * WATCHED_SHARE)))
    if num_watched < 1:
        raise MixtureError(
            f"{path} holds {len(whole)} window(s) of {window_tokens} tokens.",
            allowed=f"At least {int(1 / WATCHED_SHARE)}: some to calibrate on, some to see what came of it.",
            next_step="Give a longer text.",
        )
    return whole[:-num_watched], {path.name: whole[-num_watched:]}
