"""What a run reads: the tokenised sources of its mixture, the order of their sequences, and the lock that fixes them.

The launcher has them tokenised (`feeder`); every rank opens what is there by now.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import MixtureError
from sparsify.mixture.lock import MixtureLock, make_lock, read_lock
from sparsify.mixture.sequences.epoch_caps import (
    capped_shares,
    first_exceeded,
    fitting_steps,
    most_sequences,
)
from sparsify.mixture.sequences.reader import SequenceReader
from sparsify.mixture.sequences.shares import Shares, rounded_share, token_shares
from sparsify.mixture.sequences.stream import TrainingStream
from sparsify.mixture.tokens.ingest import Ingest, mixture_ingests
from sparsify.mixture.tokens.tokenized_source import TokenizedSource
from sparsify.recipe.identity import shared_settings
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import POLL_SECONDS, RunFolder


def shares_of(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> Shares:
    """The demand of each source over a run, with the share of exhausted sources given to the others.

    Raises:
        MixtureError: If a source would be seen more often than its max_epochs, with the budget that fits.
    """
    training, mixture = recipe.training, recipe.mixture
    num_sequences = recipe.num_steps * training.global_batch_size
    capacities = _capacities(recipe, sources)
    shares = capped_shares(mixture, num_sequences, capacities)
    exceeded = first_exceeded(mixture, num_sequences, capacities)
    if exceeded is None:
        return shares
    epoch_tokens = sources[exceeded].num_train_tokens
    asked_tokens = float(shares.demand(exceeded, num_sequences)) * training.sequence_length
    steps = fitting_steps(mixture, recipe.num_steps, training.global_batch_size, capacities)
    shorter = f"Set training.budget_tokens={steps * recipe.step_tokens}, " if steps else ""
    key = f"mixture.sources.{exceeded}"
    others = (
        f" or set {key}.when_exhausted=redistribute."
        if mixture.sources[exceeded].when_exhausted == "stop"
        else f" or raise {key}.max_epochs: no other source is left to take its share."
    )
    raise MixtureError(
        f"Source {exceeded!r} would be seen {asked_tokens / epoch_tokens:.2f} times, more than its max_epochs="
        f"{mixture.sources[exceeded].max_epochs:g}: it has {epoch_tokens:,} training tokens.",
        allowed=f"A budget of {steps * recipe.step_tokens:,} tokens fits." if steps else "Not even one step fits.",
        next_step=f"{shorter}lower its share, add text to it,{others}",
    )


def _capacities(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> dict[str, int]:
    """Most sequences that sources with max_epochs may give. One that has more text than the run asks for is not bound by it."""
    training = recipe.training
    return {
        name: int(max_epochs * TrainingStream(source, training.sequence_length, 0).num_sequences)
        for name, source in sources.items()
        if (max_epochs := recipe.mixture.sources[name].max_epochs) is not None and source.cache.complete
    }


def ingests_of(recipe: Recipe, run: RunFolder) -> dict[str, Ingest]:
    """What a run needs of each source; of one that was extended, also what it needed before."""
    training = recipe.training
    earlier = [] if not run.mixture_lock.is_file() else read_lock(run.mixture_lock).extensions

    def needed(budget_tokens: int) -> dict[str, int]:
        num_steps = budget_tokens // recipe.step_tokens
        sequences = most_sequences(recipe.mixture, num_steps * training.global_batch_size)
        return {name: count * training.sequence_length for name, count in sequences.items()}

    return mixture_ingests(
        recipe.mixture,
        load_tokenizer(run.initial),
        train_tokens=needed(training.budget_tokens),
        held_out_tokens=recipe.eval.validation_sequences_per_source * training.sequence_length,
        sequence_length=training.sequence_length,
        cache_dir=Path(recipe.cache_dir),
        earlier_train_tokens=[needed(one.from_budget_tokens) for one in earlier],
    )


def open_sources(ingests: Mapping[str, Ingest], *, verify: bool = True) -> dict[str, TokenizedSource]:
    """The sources as far as they are tokenised (see `Ingest.open`). Raises MixtureError if a file is missing, or a source
    lies on one side of the held-out split.
    """
    return {name: ingest.open(verify=verify) for name, ingest in ingests.items()}


def wait_for_sequences(reader: SequenceReader, first: int, count: int, stop_requested: Callable[[], bool]) -> bool:
    """Waits until these training sequences are tokenised. Returns False when a stop was requested before they were."""
    while not reader.is_available(first, count):
        if stop_requested():
            return False
        time.sleep(POLL_SECONDS)
    return True


def lock_of(recipe: Recipe, sources: Mapping[str, TokenizedSource]) -> MixtureLock:
    shares = shares_of(recipe, sources)
    planned = shares.planned(recipe.num_steps * recipe.training.global_batch_size)
    return make_lock(
        sources,
        token_shares(recipe.mixture),
        planned_sequences={name: planned.get(name, 0) for name in sources},
        sequence_length=recipe.training.sequence_length,
        seed=recipe.training.seed,
    )


def identity_of(recipe: Recipe, lock: MixtureLock) -> tuple[Any, ...]:
    """What a run and its baseline have in common: model, optimizer, budget, and the tokens in their order."""
    tokens = {
        name: (source.fingerprint, source.planned_tokens, rounded_share(source.token_share))
        for name, source in lock.sources.items()
    }
    data = (lock.tokenizer_fingerprint, lock.seed, recipe.mixture.instruction_loss, tokens)
    return *shared_settings(recipe), data
