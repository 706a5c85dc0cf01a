r"""Which neurons of a matrix stay in memory when not all fit: cache policies, one object for each layer (and kind of matrix).

A policy sees the mask of each token, in order, and says which of its neurons were resident, which must be read, and whose place
they take. A slot is anything of equal size that is read as a whole: a neuron's rows, or a column; for a mixture of experts
(expert, neuron), flattened. One step, with the resident set R, the mask M and the capacity C in slots:

1. hits are M ∩ R and misses M \ R, counted before anything changes;
2. min(|R \ M|, |M| + |R \ M| - C) of the residents outside M are evicted (none if that is negative): which ones is the policy;
3. M is inserted; if it is larger than the capacity, a random part of its misses.

A capacity may be lowered between two steps: hits stay for their token even where they are more than it, and nothing is inserted then.

| policy           | evicts first                                                                                     |
|------------------|--------------------------------------------------------------------------------------------------|
| `no_cache`       | holds nothing                                                                                    |
| `static`         | nothing: holds a set that was chosen and read beforehand, the hot set                            |
| `lru`            | what was used longest ago                                                                        |
| `lfu`            | what was used least often; counts survive eviction                                               |
| `belady`         | what is used again last: needs the masks to come, so it is a bound, not a policy to run          |
| `belady_bypass`  | the same, and need not insert what it read: the most hits of all that begin with nothing         |

Among equals the lowest index is evicted. The step, LRU, LFU and Belady's rule are those of the simulator of DIP (arXiv 2412.01380).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

POLICIES = ("no_cache", "static", "lru", "lfu", "belady", "belady_bypass")
ONLINE_POLICIES = POLICIES[:4]
"""Those that know nothing of the masks to come."""
NEVER = np.iinfo(np.int64).max
_NONE: Indices = np.empty(0, np.intp)


@dataclass(frozen=True)
class CacheStep:
    """What one token did to a cache: ascending indices of slots.

    Attributes:
        hits: Used, and resident before.
        misses: Used, and to be read.
        evicted: No longer resident. Those outside the mask may be overwritten at once; `belady_bypass` alone also evicts hits.
        inserted: The misses that are resident from now on; the others are read for this token only.
    """

    hits: Indices
    misses: Indices
    evicted: Indices
    inserted: Indices


class CachePolicy(Protocol):
    """A bounded set of slots that changes with each token's mask.

    Attributes:
        capacity: Slots that are resident at most.
        resident: Which are now, bool [slots]; read only.
    """

    capacity: int
    resident: Mask

    def step(self, mask: Mask) -> CacheStep:
        """Uses the slots of one token's mask, bool [slots]."""
        ...

    def reset(self) -> None:
        """Forgets everything: the state before the first token."""
        ...


class StaticSet:
    """Holds a fixed set.

    Args:
        hot: Which slots, bool [slots].
    """

    def __init__(self, hot: Mask) -> None:
        self.resident = hot.copy()
        self.capacity = int(hot.sum())

    def step(self, mask: Mask) -> CacheStep:
        return CacheStep(np.flatnonzero(mask & self.resident), np.flatnonzero(mask & ~self.resident), _NONE, _NONE)

    def reset(self) -> None:
        pass


class EvictingCache:
    """What LRU, LFU and Belady's rule share: the three parts of a step. They differ in what they evict first.

    Args:
        slots: Of the matrix.
        capacity: At most `slots` are used of it.
        seed: Of the random part of masks that are larger than the capacity.
    """

    def __init__(self, slots: int, capacity: int, seed: int = 0) -> None:
        self.capacity = min(capacity, slots)
        self.resident: Mask = np.zeros(slots, np.bool_)
        self._seed = seed
        self._random = np.random.default_rng(seed)

    def reset(self) -> None:
        self.resident = np.zeros_like(self.resident)
        self._random = np.random.default_rng(self._seed)

    def step(self, mask: Mask) -> CacheStep:
        hit, miss, idle = mask & self.resident, mask & ~self.resident, self.resident & ~mask
        hits, misses, others = np.flatnonzero(hit), np.flatnonzero(miss), np.flatnonzero(idle)
        self.use(mask)
        excess = min(len(others), len(hits) + len(misses) + len(others) - self.capacity)
        evicted = others[_first(self.keeping(others), excess)] if excess > 0 else _NONE
        room = max(0, self.capacity - len(hits) - len(others) + len(evicted))
        inserted = misses if len(misses) <= room else np.sort(self._random.permutation(misses)[:room])
        self.resident[evicted] = False
        self.resident[inserted] = True
        self.change(evicted)
        return CacheStep(hits, misses, np.sort(evicted), inserted)

    def use(self, mask: Mask) -> None:
        """Takes note of what a token uses, before anything is evicted."""

    def keeping(self, others: Indices) -> NDArray[np.int64]:
        """How much each of these residents is worth keeping; the smallest are evicted."""
        raise NotImplementedError

    def change(self, evicted: Indices) -> None:
        """Takes note of what was evicted."""


class LeastRecentlyUsed(EvictingCache):
    """Ages count the tokens since a resident was used."""

    def __init__(self, slots: int, capacity: int, seed: int = 0) -> None:
        super().__init__(slots, capacity, seed)
        self.ages = np.zeros(slots, np.int64)

    def reset(self) -> None:
        super().reset()
        self.ages[:] = 0

    def use(self, mask: Mask) -> None:
        self.ages[self.resident] += 1
        self.ages[mask] = 0

    def keeping(self, others: Indices) -> NDArray[np.int64]:
        return -self.ages[others]

    def change(self, evicted: Indices) -> None:
        self.ages[evicted] = 0


class LeastFrequentlyUsed(EvictingCache):
    """Counts of uses, resident or not."""

    def __init__(self, slots: int, capacity: int, seed: int = 0) -> None:
        super().__init__(slots, capacity, seed)
        self.counts = np.zeros(slots, np.int64)

    def reset(self) -> None:
        super().reset()
        self.counts[:] = 0

    def use(self, mask: Mask) -> None:
        self.counts[mask] += 1

    def keeping(self, others: Indices) -> NDArray[np.int64]:
        return self.counts[others]


class Belady(EvictingCache):
    """Evicts what is used again last.

    Args:
        masks: Of all tokens to come, bool [tokens, slots]: `step` must be given these, in order.
        capacity: In slots.
        bypass: Whether a token's own slots need not stay resident after it.
        seed: As of the others.
    """

    def __init__(self, masks: Mask, capacity: int, *, bypass: bool = False, seed: int = 0) -> None:
        super().__init__(masks.shape[1], capacity, seed)
        self._masks, self._bypass = masks, bypass
        self._token = 0
        self._next = _next_uses(masks)

    def reset(self) -> None:
        super().reset()
        self._token = 0

    def step(self, mask: Mask) -> CacheStep:
        assert np.array_equal(mask, self._masks[self._token]), "these are not the masks that were announced"
        step = self._best(mask) if self._bypass else super().step(mask)
        self._token += 1
        return step

    def keeping(self, others: Indices) -> NDArray[np.int64]:
        return -self._next[self._token, others].astype(np.int64)

    def _best(self, mask: Mask) -> CacheStep:
        hits, misses = np.flatnonzero(mask & self.resident), np.flatnonzero(mask & ~self.resident)
        known = np.flatnonzero(mask | self.resident)
        # Among those used equally late this token's own stay, as they do without bypass.
        order = np.lexsort((known, ~mask[known], self._next[self._token, known]))
        before = self.resident
        self.resident = np.zeros_like(before)
        self.resident[known[order[: self.capacity]]] = True
        return CacheStep(hits, misses, np.flatnonzero(before & ~self.resident), np.flatnonzero(self.resident & ~before))


def cache_policy(
    name: str, slots: int, capacity: int, *, hot: Mask | None = None, masks: Mask | None = None, seed: int = 0
) -> CachePolicy:
    """The policy of that name, with nothing resident unless it is `static`.

    Args:
        name: One of POLICIES.
        slots: Of the matrix.
        capacity: Slots that may be resident; 0 or more.
        hot: Of `static`: which are held, no more than the capacity, bool [slots].
        masks: Of Belady's: those of all tokens, bool [tokens, slots].
        seed: Of the random part of masks that are larger than the capacity.

    Raises:
        ValueError: If the name is unknown, or what it needs is not given or does not fit.
    """
    if name == "no_cache":
        return StaticSet(np.zeros(slots, np.bool_))
    if name == "static":
        if hot is None or hot.shape != (slots,) or hot.sum() > capacity:
            raise ValueError(f"A static cache of {capacity} needs a hot set of at most as many of {slots} slots")
        return StaticSet(hot)
    if name == "lru":
        return LeastRecentlyUsed(slots, capacity, seed)
    if name == "lfu":
        return LeastFrequentlyUsed(slots, capacity, seed)
    if name not in POLICIES:
        raise ValueError(f"No cache policy {name!r}; there are {', '.join(POLICIES)}")
    if masks is None or masks.shape[1] != slots:
        raise ValueError(f"{name} needs the masks of all tokens, of {slots} slots")
    return Belady(masks, capacity, bypass=name == "belady_bypass", seed=seed)


def hot_set(masks: Iterable[Mask], slots: int, capacity: int) -> Mask:
    """The slots that these masks use most often, as many as the capacity; of equals those of the lowest index. bool [slots]."""
    counts = np.zeros(slots, np.int64)
    for mask in masks:
        counts += mask
    hot = np.zeros(slots, np.bool_)
    hot[_first(-counts, capacity)] = True
    return hot


def _first(values: NDArray[np.int64], number: int) -> Indices:
    """Where the smallest values are, of equals those of the lowest index."""
    return np.argsort(values, kind="stable")[:number]


def _next_uses(masks: Mask) -> NDArray[np.int64]:
    """The token at which each slot is used next after each token; NEVER if it is not. [tokens, slots]."""
    following = np.full(masks.shape, NEVER, np.int64)
    upcoming = np.full(masks.shape[1], NEVER, np.int64)
    for token in range(len(masks) - 1, -1, -1):
        following[token] = upcoming
        upcoming[masks[token]] = token
    return following
