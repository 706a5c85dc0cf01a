"""What a run and its baseline have in common."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sparsify.mixture.lock import MixtureLock
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.training import EXECUTION_SETTINGS

SHARE_DECIMALS = 9
"""Shares that agree this far are the same, whichever way a mixture states them."""


def identity_of(recipe: Recipe, lock: MixtureLock) -> tuple[Any, ...]:
    """What a run and its baseline have in common: model, optimiser, budget, and the tokens in their order."""
    training = asdict(recipe.training)
    for key in EXECUTION_SETTINGS:
        del training[key]
    tokens = {
        name: (source.fingerprint, source.planned_tokens, rounded_share(source.token_share))
        for name, source in lock.sources.items()
    }
    data = (lock.tokenizer_fingerprint, lock.seed, recipe.mixture.instruction_loss, tokens)
    return asdict(recipe.model), asdict(recipe.optimizer), training, data


def rounded_share(share: float) -> float:
    """A token share, without what rounding makes of the ways to state it."""
    return round(share, SHARE_DECIMALS)
