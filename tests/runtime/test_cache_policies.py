"""Cache policies: the published test vectors, and laws that any sequence of masks must obey."""

import itertools
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsify.runtime.cache_policies import (
    ONLINE_POLICIES,
    POLICIES,
    Belady,
    CachePolicy,
    EvictingCache,
    LeastFrequentlyUsed,
    LeastRecentlyUsed,
    cache_policy,
    hot_set,
)


def bits(word: str) -> np.ndarray:
    return np.array([letter == "1" for letter in word])


def word(mask: np.ndarray) -> str:
    return "".join("1" if bit else "0" for bit in mask)


Kind = TypeVar("Kind", bound=EvictingCache)


def filled(cache: Kind, resident: str) -> Kind:
    cache.resident[:] = bits(resident)
    return cache


def test_lru_evicts_the_oldest_and_ages_what_it_keeps() -> None:
    cache = filled(LeastRecentlyUsed(5, 3), "11100")
    cache.ages[:] = [0, 1, 2, 0, 0]
    step = cache.step(bits("00110"))
    assert word(cache.resident) == "10110"
    assert cache.ages.tolist() == [1, 0, 0, 0, 0]
    assert [part.tolist() for part in (step.hits, step.misses, step.evicted, step.inserted)] == [[2], [3], [1], [3]]


def test_lfu_evicts_the_least_counted_and_counts_survive() -> None:
    cache = filled(LeastFrequentlyUsed(5, 3), "11100")
    cache.counts[:] = [2, 3, 1, 1, 1]
    step = cache.step(bits("00110"))
    assert word(cache.resident) == "01110"
    assert cache.counts.tolist() == [2, 3, 2, 2, 1]
    assert step.evicted.tolist() == [0]


@pytest.mark.parametrize("kind", [LeastRecentlyUsed, LeastFrequentlyUsed])
def test_a_mask_as_large_as_the_cache_replaces_it(kind: type[EvictingCache]) -> None:
    cache = filled(kind(5, 3), "11100")
    cache.step(bits("00111"))
    assert word(cache.resident) == "00111"


@pytest.mark.parametrize(
    ("masks", "last"),
    [
        (["00110", "11000", "01001", "01100", "01100"], "01101"),
        (["00110", "01001", "11000", "10001", "00011"], "01011"),
    ],
)
def test_belady_evicts_what_is_used_again_last(masks: list[str], last: str) -> None:
    coming = np.array([bits(mask) for mask in masks])
    cache = Belady(coming, 3)
    for mask in coming:
        cache.step(mask)
    assert word(cache.resident) == last


def test_only_a_random_part_of_a_mask_larger_than_the_cache_is_inserted() -> None:
    seen = set()
    for seed in range(20):
        cache = filled(LeastRecentlyUsed(6, 3, seed), "110000")
        step = cache.step(bits("101111"))
        assert cache.resident[0]
        assert step.evicted.tolist() == [1]
        assert len(step.inserted) == 2
        assert set(step.inserted) < set(step.misses)
        seen.add(word(cache.resident))
    assert len(seen) > 3


@given(
    st.sampled_from([LeastRecentlyUsed, LeastFrequentlyUsed]),
    st.lists(st.integers(0, 9), min_size=2),
    st.integers(0, 2**31),
)
def test_a_lowered_capacity_is_kept_as_soon_as_masks_allow(
    kind: type[EvictingCache], capacities: list[int], seed: int
) -> None:
    """Only the neurons of the token itself may exceed it: their rows are being read."""
    random = np.random.default_rng(seed)
    cache = kind(9, max(capacities))
    for capacity in sorted(capacities, reverse=True):
        cache.capacity = capacity
        mask = random.random(9) < 0.4
        before = cache.resident.copy()
        step = cache.step(mask)
        assert cache.resident.sum() <= max(capacity, len(step.hits))
        assert not cache.resident[~mask & ~before].any()
        assert len(step.inserted) <= max(0, capacity - len(step.hits))
        assert set(step.inserted) <= set(step.misses)


def test_a_policy_that_lacks_what_it_needs_is_refused() -> None:
    for name, words in (("fifo", "No cache policy"), ("static", "hot set"), ("belady", "masks of all tokens")):
        with pytest.raises(ValueError, match=words):
            cache_policy(name, 4, 2)
    with pytest.raises(ValueError, match="at most as many"):
        cache_policy("static", 4, 2, hot=bits("1110"))


def test_the_hot_set_is_what_is_used_most() -> None:
    masks = [bits("11001"), bits("01001"), bits("01100")]
    assert word(hot_set(masks, 5, 2)) == "01001"
    assert word(hot_set(masks, 5, 3)) == "11001"  # of those used once the first


def replay(policy: CachePolicy, masks: np.ndarray) -> int:
    """Hits over all tokens; checks what each step says against the resident set."""
    hits = 0
    for mask in masks:
        before = policy.resident.copy()
        step = policy.step(mask)
        assert np.array_equal(np.sort(np.concatenate([step.hits, step.misses])), np.flatnonzero(mask))
        assert before[step.hits].all()
        assert not before[step.misses].any()
        after = before.copy()
        after[step.evicted] = False
        after[step.inserted] = True
        assert np.array_equal(after, policy.resident)
        assert set(step.inserted) <= set(step.misses)
        assert policy.resident.sum() <= policy.capacity
        hits += len(step.hits)
    return hits


def policies(masks: np.ndarray, capacity: int) -> dict[str, CachePolicy]:
    slots = masks.shape[1]
    hot = hot_set(masks, slots, capacity)
    return {name: cache_policy(name, slots, capacity, hot=hot, masks=masks) for name in POLICIES}


@st.composite
def sequences(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    slots = draw(st.integers(1, 12))
    rows = draw(st.lists(st.lists(st.booleans(), min_size=slots, max_size=slots), min_size=1, max_size=12))
    return np.array(rows, np.bool_), draw(st.integers(0, slots + 1))


@given(sequences())
def test_no_policy_has_more_hits_than_the_bound(case: tuple[np.ndarray, int]) -> None:
    masks, capacity = case
    hits = {name: replay(policy, masks) for name, policy in policies(masks, capacity).items()}
    assert hits["no_cache"] == 0
    static = hits.pop("static")  # read before the first token: it may have as many hits more as it holds
    assert hits["belady_bypass"] >= max(*hits.values(), static - min(capacity, masks.shape[1]))
    if masks.sum(1).max() <= capacity:  # then each inserts all that it reads
        assert hits["belady"] >= max(hits["lru"], hits["lfu"])
    if capacity >= masks.shape[1]:  # everything fits: each slot is read once
        assert hits["lru"] == hits["lfu"] == hits["belady"] == masks.sum() - masks.any(0).sum()


@given(sequences())
def test_a_reset_forgets_everything(case: tuple[np.ndarray, int]) -> None:
    masks, capacity = case
    for policy in policies(masks, capacity).values():
        first = replay(policy, masks)
        policy.reset()
        assert replay(policy, masks) == first


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_the_bound_is_the_best_of_all_ways_to_keep(capacity: int) -> None:
    """Against an exhaustive search over what may stay after each token."""
    random = np.random.default_rng(capacity)
    for _ in range(10):
        masks = random.random((6, 5)) < 0.4
        best = {frozenset(): 0}
        for mask in masks:
            used = frozenset(np.flatnonzero(mask).tolist())
            reached: dict[frozenset[int], int] = {}
            for resident, hits in best.items():
                for kept in itertools.combinations(sorted(resident | used), min(capacity, len(resident | used))):
                    key = frozenset(kept)
                    reached[key] = max(reached.get(key, 0), hits + len(resident & used))
            best = reached
        assert replay(Belady(masks, capacity, bypass=True), masks) == max(best.values())


def test_skewed_masks_order_the_policies_as_published() -> None:
    """Neurons of unequal frequency that come in runs: no cache < LRU < LFU < Belady, as DIP reports it."""
    random = np.random.default_rng(0)
    often = random.permutation(np.linspace(0.02, 0.6, 200) ** 1.5)
    masks = random.random((150, 200)) < often
    hits = {name: replay(policy, masks) for name, policy in policies(masks, 60).items()}
    assert hits["no_cache"] < hits["lru"] < hits["lfu"] < hits["belady"] <= hits["belady_bypass"]
    assert set(ONLINE_POLICIES) < set(hits)
