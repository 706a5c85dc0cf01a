"""What a run reads: the tokenised sources of its mixture, the order of their windows, and the lock that fixes them.

The launcher has them tokenised (`feeder`); every rank opens what is there by now.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from sparsify.conversion.folder import load_tokenizer
from sparsify.errors import MixtureError
from sparsify.mixture.ingest import Ingest, mixture_ingests
from sparsify.mixture.lock import MixtureLock, make_lock
from sparsify.mixture.shares import Shares, Stretch, last_window_within, redistributed
from sparsify.mixture.stream import TrainingStream
from sparsify.mixture.tokens import TokenizedSource
from sparsify.recipe import Recipe, share_phases, token_shares
from sparsify.training.run_folder import RunFolder


def stated_shares(recipe: Recipe) -> Shares:
    """The demand of each source over a run, as the mixture states it."""
    num_windows = recipe.num_steps * recipe.training.batch_windows
    return Shares(
        [
            Stretch(round(end * num_windows), first, last)
            for end, first, last in share_phases(recipe.mixture)
        ]
    )


def shares_of(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> Shares:
    """The demand of each source over a run, with the share of exhausted sources given to the others.

    Raises:
        MixtureError: If a source would be seen more often than its max_epochs, with the budget that fits.
    """
    shares, training = stated_shares(recipe), recipe.training
    capacities = _capacities(recipe, sources)
    shares = redistributed(
        shares,
        {
            name: capacity
            for name, capacity in capacities.items()
            if recipe.mixture.sources[name].when_exhausted == "redistribute"
        },
    )
    num_windows = recipe.num_steps * training.batch_windows
    fits = {name: last_window_within(shares, name, windows) for name, windows in capacities.items()}
    tightest = min(fits, key=fits.__getitem__, default=None)
    if tightest is not None and fits[tightest] < num_windows:
        asked = float(shares.demand(tightest, num_windows)) / sources[tightest].num_train_tokens
        steps = int(fits[tightest]) // training.batch_windows
        raise MixtureError(
            f"Source {tightest!r} would be seen {asked * training.window_tokens:.2f} times, more than its max_epochs="
            f"{recipe.mixture.sources[tightest].max_epochs:g}: it has {sources[tightest].num_train_tokens:,} training tokens.",
            allowed=f"At these shares a budget of {steps * recipe.step_tokens:,} tokens fits.",
            next_step=f"Set training.budget_tokens={steps * recipe.step_tokens}, lower its share, add text to it, or set "
            f"mixture.sources.{tightest}.when_exhausted=redistribute.",
        )
    return shares


def _capacities(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> dict[str, int]:
    """Most windows that sources with max_epochs may give. One that has more text than the run asks for is not bound by it."""
    training = recipe.training
    return {
        name: int(max_epochs * TrainingStream(source, training.window_tokens, 0).num_windows)
        for name, source in sources.items()
        if (max_epochs := recipe.mixture.sources[name].max_epochs) is not None
        and source.cache.complete
    }


def ingests_of(recipe: Recipe, run: RunFolder) -> dict[str, Ingest]:
    """What a run needs of each source.

    Raises:
        MixtureError: If the tokenizer cannot serve.
    """
    training, shares = recipe.training, stated_shares(recipe)
    num_windows = recipe.num_steps * training.batch_windows
    return mixture_ingests(
        recipe.mixture,
        load_tokenizer(run.initial),
        # The schedule is never a whole window ahead of a source's demand. A source without a share is read as well:
        # what the others do to it is measured on its held-out text.
        train_tokens={
            name: (math.ceil(shares.demand(name, num_windows)) + 1) * training.window_tokens
            for name in recipe.mixture.sources
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
    shares = shares_of(recipe, sources)
    num_windows = recipe.num_steps * recipe.training.batch_windows
    return make_lock(
        sources,
        token_shares(recipe.mixture),
        planned_windows={name: round(shares.demand(name, num_windows)) for name in sources},
        window_tokens=recipe.training.window_tokens,
        seed=recipe.training.seed,
    )
