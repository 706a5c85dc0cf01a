"""What a run reads: the tokenised sources of its mixture, and the lock that fixes them.

The launcher calls this first and tokenises what is missing; every rank calls it again and finds it in the cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparsify.conversion.folder import load_tokenizer
from sparsify.mixture.lock import MixtureLock, make_lock
from sparsify.mixture.tokens import Progress, TokenizedSource, ingest_mixture
from sparsify.recipe import Recipe, token_shares
from sparsify.training.run_folder import RunFolder


def open_sources(
    recipe: Recipe, run: RunFolder, on_progress: Progress | None = None
) -> dict[str, TokenizedSource]:
    """The tokenised sources of a run, as far as its budget needs them.

    Raises:
        MixtureError: If a source cannot supply its tokens.
    """
    return ingest_mixture(
        recipe.mixture,
        load_tokenizer(run.initial),
        budget_tokens=recipe.num_steps * recipe.step_tokens,
        window_tokens=recipe.training.window_tokens,
        cache_dir=Path(recipe.cache_dir).expanduser(),
        on_progress=on_progress,
        held_out_tokens=recipe.eval.validation_windows_per_source * recipe.training.window_tokens,
    )


def lock_of(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> MixtureLock:
    """The lock that these sources give this run."""
    return make_lock(
        sources,
        token_shares(recipe.mixture),
        num_windows=recipe.num_steps * recipe.training.batch_windows,
        window_tokens=recipe.training.window_tokens,
        seed=recipe.training.seed,
    )
