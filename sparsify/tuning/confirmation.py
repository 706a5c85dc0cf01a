"""Confirmation: trains default and tuned mixture again, with another seed, and evaluates on other held-out sequences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist

import numpy as np

from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.recipe import Recipe
from sparsify.tuning.decision import LEVEL
from sparsify.tuning.record import Confirmation
from sparsify.tuning.trials import Measurement, Proxy, check_comparable, proxy_recipe, run_proxy


def confirm(
    recipe: Recipe,
    tuned: Mapping[str, float],
    weights: Mapping[str, float],
    num_tokens: int,
    folder: Path,
) -> Confirmation:
    """Trains both mixtures and compares them on held-out sequences that no trial was evaluated on.

    Args:
        recipe: The recipe that was tuned.
        tuned: Token share of each source in the tuned mixture.
        weights: Weight of each domain's loss; they sum to 1.
        num_tokens: Training tokens of each run.
        folder: Folder of the tuning.
    """
    seed = recipe.training.seed + 1
    # The shares are part of the folder's name, because more trials may lead to another choice.
    key = hashlib.blake2b(json.dumps(tuned, sort_keys=True).encode(), digest_size=3).hexdigest()
    variants = {"default": token_shares(recipe.mixture), f"tuned-{key}": tuned}
    measured = []
    for name, shares in variants.items():
        place = folder / f"confirm-{num_tokens}" / name
        proxy = Proxy(
            f"Confirmation, {name.partition('-')[0]} mixture",
            proxy_recipe(recipe, shares, num_tokens, place, seed),
            recipe.eval.validation_sequences_per_source,
            "confirmation",
        )
        measured.append((proxy, run_proxy(proxy)))
    check_comparable(measured)
    (proxy, default), (_, better) = measured
    budget_tokens = proxy.recipe.num_steps * proxy.recipe.step_tokens
    return compare(default, better, weights, num_tokens=budget_tokens, seed=seed)


def compare(
    default: Measurement,
    tuned: Measurement,
    weights: Mapping[str, float],
    *,
    num_tokens: int,
    seed: int,
) -> Confirmation:
    """Compares two models sequence by sequence.

    Args:
        default: Losses of the default mixture's model on the held-out sequences.
        tuned: Losses of the tuned mixture's model on the same sequences.
        weights: Weight of each domain's loss; they sum to 1.
        num_tokens: Training tokens of each run, for the record.
        seed: Seed of both runs, for the record.
    """
    before, after = (sum(weights[name] * loss for name, loss in one.losses.items()) for one in (default, tuned))
    variance = 0.0
    for name, weight in weights.items():
        gaps = np.subtract(tuned.sequence_losses[name], default.sequence_losses[name])
        # The variance of a single sequence is unknown; it is counted as 0.
        variance += weight**2 * float(gaps.var(ddof=1)) / len(gaps) if len(gaps) > 1 else 0.0
    limit = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return Confirmation(
        num_tokens=num_tokens,
        seed=seed,
        default_losses=default.losses,
        tuned_losses=tuned.losses,
        default_loss=before,
        tuned_loss=after,
        difference=after - before,
        half_width=limit * variance**0.5,
        default_zeros=default.zeros,
        tuned_zeros=tuned.zeros,
    )
