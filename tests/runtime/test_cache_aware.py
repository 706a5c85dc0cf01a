"""Cache-aware masking, step by step."""

import numpy as np
import pytest

from sparsify.runtime.cache_aware import CacheAwareTopK, gamma_at
from sparsify.runtime.cache_policies import LeastFrequentlyUsed, cache_policy

SIZES = np.array([5.0, 4.0, 3.0, 2.0, 1.0])


def resident(slots: list[int]) -> LeastFrequentlyUsed:
    cache = LeastFrequentlyUsed(5, 3)
    cache.resident[slots] = True
    return cache


@pytest.mark.parametrize(
    ("gamma", "fixed_top", "chosen"),
    [(1.0, 0, [0, 1]), (0.5, 0, [0, 2]), (0.2, 0, [2, 3]), (0.2, 1, [0, 2]), (0.0, 0, [2, 3])],
)
def test_what_is_resident_is_preferred_by_gamma(gamma: float, fixed_top: int, chosen: list[int]) -> None:
    choice = CacheAwareTopK(resident([2, 3]), 2, gamma, warm_up=False, fixed_top=fixed_top)
    mask, step = choice.choose(SIZES)
    assert np.flatnonzero(mask).tolist() == chosen
    assert step.misses.tolist() == [slot for slot in chosen if slot not in (2, 3)]


def test_the_warm_up_starts_plain_and_ends_at_gamma() -> None:
    assert gamma_at(0.2, 0) == 1.0
    assert gamma_at(0.2, 4) == pytest.approx(1 - 0.8 * (1 - 0.2))
    assert gamma_at(0.2, 100) == pytest.approx(0.2)
    assert gamma_at(0.0, 1) == 0.0
    plain, warm = (CacheAwareTopK(resident([2, 3]), 2, 0.2, warm_up=up) for up in (False, True))
    assert np.flatnonzero(warm.choose(SIZES)[0]).tolist() == [0, 1] != np.flatnonzero(plain.choose(SIZES)[0]).tolist()
    warm.reset()
    assert not warm.policy.resident.any()
    assert np.flatnonzero(warm.choose(SIZES)[0]).tolist() == [0, 1]


def test_hits_rise_as_gamma_falls_and_what_is_chosen_gets_smaller() -> None:
    random = np.random.default_rng(0)
    scale = random.permutation(np.linspace(0.3, 1.5, 100))
    tokens = np.abs(random.standard_normal((80, 100))) * scale
    hits, kept = [], []
    for gamma in (1.0, 0.7, 0.4, 0.1):
        choice = CacheAwareTopK(cache_policy("lfu", 100, 40), 30, gamma)
        steps = [choice.choose(sizes) for sizes in tokens]
        hits.append(sum(len(step.hits) for _, step in steps))
        kept.append(sum(float(sizes[mask].sum()) for sizes, (mask, _) in zip(tokens, steps, strict=True)))
    assert hits == sorted(hits)
    assert len(set(hits)) == 4
    assert kept == sorted(kept, reverse=True)


def test_a_gamma_above_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gamma is 1\.5"):
        CacheAwareTopK(resident([]), 2, 1.5)
