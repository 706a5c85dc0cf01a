"""Replays the masks of a decode through caches: for every token, layer and unit, what is resident, prefetched, and read late.

Layers are replayed one after the other, so that only two of them need be in memory. That is exact: a cache belongs to a layer, and
what is guessed for a layer's next token depends on its own cache and on the layer before it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.runtime.cache_policies import CachePolicy, cache_policy, hot_set
from sparsify.runtime.prefetch import OtherText, Prefetcher, Seen, prefetcher
from sparsify.simulation.trace import LayerTrace, Trace


@dataclass(frozen=True)
class Caching:
    """How slots are cached.

    Attributes:
        policy: One of `cache_policies.POLICIES`.
        capacities: Slots that a layer's cache of each unit holds.
        prefetch: One of `prefetch.PREFETCHERS`.
        seed: Of random choices.
    """

    policy: str
    capacities: Sequence[int]
    prefetch: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class Moves:
    """Numbers of slots, int64 [tokens, layers, units] each. What is needed is one of the first three.

    Attributes:
        hits: Resident.
        ahead: Not resident, but prefetched.
        late: Neither: the layer waits for them.
        prefetched: Read ahead of their use, needed or not.
    """

    hits: NDArray[np.int64]
    ahead: NDArray[np.int64]
    late: NDArray[np.int64]
    prefetched: NDArray[np.int64]


def replay(trace: Trace, caching: Caching, other: Sequence[Trace] = ()) -> Moves:
    """One decode, from empty caches; a static set is resident from the start.

    Args:
        trace: Of the decode.
        caching: How its slots are cached.
        other: Traces of other text, to which hot sets and prefetchers are fitted.

    Raises:
        ValueError: If the policy or the prefetcher needs other text and there is none.
    """
    found: list[NDArray[np.int64]] = []
    before: tuple[LayerTrace, list[LayerTrace]] | None = None
    for own, *others in zip(trace.layers(), *(one.layers() for one in other), strict=True):
        found.append(_replay_layer(own, others, before, caching))
        before = own, others
    hits, ahead, late, prefetched = np.moveaxis(np.stack(found), [3, 1, 0, 2], [0, 1, 2, 3])
    return Moves(hits, ahead, late, prefetched)


def _replay_layer(
    own: LayerTrace,
    others: list[LayerTrace],
    before: tuple[LayerTrace, list[LayerTrace]] | None,
    caching: Caching,
) -> NDArray[np.int64]:
    """Counts [tokens, units, 4] of one layer."""
    counts = np.zeros((len(own.masks[0]), len(own.masks), 4), np.int64)
    for unit, masks in enumerate(own.masks):
        policy = _policy(caching, unit, masks, others)
        guesser = _prefetcher(caching, unit, masks.shape[1], others, before)
        for token, mask in enumerate(masks):
            ahead = 0
            wanted = None
            if guesser is not None and (token or before is not None):
                wanted = guesser.guess(_seen(before, unit, masks, token)) & ~policy.resident
            step = policy.step(mask)
            if wanted is not None:
                ahead = int(wanted[step.misses].sum())
                counts[token, unit, 3] = wanted.sum()
            counts[token, unit, :3] = len(step.hits), ahead, len(step.misses) - ahead
    return counts


def _seen(before: tuple[LayerTrace, list[LayerTrace]] | None, unit: int, masks: NDArray[np.bool_], token: int) -> Seen:
    previous = None if before is None else before[0]
    return Seen(
        needed=None if previous is None else previous.masks[unit][token],
        inputs=None if previous is None or previous.inputs is None else previous.inputs[token],
        before=masks[token - 1] if token else None,
    )


def _policy(caching: Caching, unit: int, masks: NDArray[np.bool_], others: list[LayerTrace]) -> CachePolicy:
    slots, capacity = masks.shape[1], caching.capacities[unit]
    hot = None
    if caching.policy == "static":
        if not others:
            raise ValueError("A static set needs masks of other text")
        hot = hot_set((mask for other in others for mask in other.masks[unit]), slots, capacity)
    return cache_policy(caching.policy, slots, capacity, hot=hot, masks=masks, seed=caching.seed)


def _prefetcher(
    caching: Caching,
    unit: int,
    slots: int,
    others: list[LayerTrace],
    before: tuple[LayerTrace, list[LayerTrace]] | None,
) -> Prefetcher | None:
    if not others:
        return prefetcher(caching.prefetch, slots, None, caching.seed)
    previous = None if before is None else before[1]
    inputs = None if previous is None else [one.inputs for one in previous if one.inputs is not None]
    other = OtherText(
        np.concatenate([one.masks[unit] for one in others]),
        None if previous is None else np.concatenate([one.masks[unit] for one in previous]),
        np.concatenate(inputs) if inputs else None,
    )
    return prefetcher(caching.prefetch, slots, other, caching.seed)
