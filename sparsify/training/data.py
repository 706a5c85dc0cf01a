"""What a run reads: the tokenised sources of its mixture, the order of their windows, and the lock that fixes them.

The launcher has them tokenised (`feeder`); every rank opens what is there by now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from sparsify.conversion.folder import load_tokenizer
from sparsify.mixture.ingest import Ingest, mixture_ingests
from sparsify.mixture.lock import MixtureLock, make_lock
from sparsify.mixture.plan import SourceSchedule
from sparsify.mixture.tokens import TokenizedSource
from sparsify.recipe import Recipe, token_shares
from sparsify.training.run_folder import RunFolder


def schedule_of(recipe: Recipe) -> SourceSchedule:
    """Which source gives which window of a run."""
    return SourceSchedule(token_shares(recipe.mixture))


def ingests_of(recipe: Recipe, run: RunFolder) -> dict[str, Ingest]:
    """What a run needs of each source.

    Raises:
        MixtureError: If the tokenizer cannot serve.
    """
    training, num_tokens = recipe.training, recipe.num_steps * recipe.step_tokens
    return mixture_ingests(
        recipe.mixture,
        load_tokenizer(run.initial),
        # The plan is never a whole window ahead of a source's share.
        train_tokens={
            name: math.ceil(num_tokens * share) + training.window_tokens
            for name, share in token_shares(recipe.mixture).items()
        },
        held_out_tokens=recipe.eval.validation_windows_per_source * training.window_tokens,
        window_tokens=training.window_tokens,
        cache_dir=Path(recipe.cache_dir),
    )


def open_sources(ingests: Mapping[str, Ingest]) -> dict[str, TokenizedSource]:
    """The sources as far as they are tokenised.

    Raises:
        MixtureError: If a file is missing, or a source lies on one side of the held-out split.
    """
    return {name: ingest.open() for name, ingest in ingests.items()}


def lock_of(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> MixtureLock:
    """The lock that these sources give this run."""
    num_windows = recipe.num_steps * recipe.training.batch_windows
    return make_lock(
        sources,
        token_shares(recipe.mixture),
        planned_windows=schedule_of(recipe).counts(num_windows),
        window_tokens=recipe.training.window_tokens,
        seed=recipe.training.seed,
    )
