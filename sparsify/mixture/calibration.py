"""Windows to calibrate a conversion on, and others to watch it with."""

from __future__ import annotations

from pathlib import Path

from sparsify.catalogue import YAML, load_mixture
from sparsify.errors import MixtureError
from sparsify.mixture.encoding import Tokenizer
from sparsify.mixture.heldout import check_text_or_mixture, windows_from
from sparsify.mixture.ingest import Progress, mixture_ingests
from sparsify.mixture.stream import TrainingStream
from sparsify.mixture.windows import Window, held_out_windows, read_window
from sparsify.recipe import MixtureSection, token_shares

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
