"""Balanced K-means: sizes, the permutation, planted clusters, and that the same rows give the same groups."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsify.methods.balanced_kmeans import balanced_assignment, balanced_kmeans, random_groups, within


@given(st.integers(1, 6), st.integers(1, 7), st.integers(1, 5), st.integers(0, 2**16))
def test_it_is_a_permutation_of_clusters_of_one_size_in_the_old_order(
    size: int, clusters: int, features: int, seed: int
) -> None:
    rows = torch.randn(size * clusters, features, generator=torch.Generator().manual_seed(seed)).round()
    order = balanced_kmeans(rows, size)
    assert sorted(order.tolist()) == list(range(len(rows)))
    groups = order.unflatten(0, (-1, size))
    assert torch.equal(groups, groups.sort(1).values)
    assert torch.equal(groups[:, 0], groups[:, 0].sort().values)
    assert torch.equal(order, balanced_kmeans(rows, size))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_every_assignment_is_balanced_and_no_two_rows_would_both_gain_by_a_swap_with_a_free_place(
    size: int, clusters: int, seed: int
) -> None:
    distances = torch.rand(size * clusters, clusters, generator=torch.Generator().manual_seed(seed))
    found = balanced_assignment(distances, size)
    assert torch.bincount(found, minlength=clusters).tolist() == [size] * clusters
    # Greedy: whoever is not with the nearest centre found it full of rows that are nearer to it, or that came in an earlier round.
    nearest = distances.argmin(1)
    for row in torch.where(found != nearest)[0].tolist():
        inside = distances[(found == nearest[row]) & (nearest == nearest[row]), nearest[row]]
        assert (inside <= distances[row, nearest[row]]).all()


def test_planted_clusters_are_found_and_are_the_best_there_are() -> None:
    generator = torch.Generator().manual_seed(1)
    centres = torch.randn(4, 16, generator=generator) * 5
    rows = (centres.repeat_interleave(8, 0) + torch.randn(32, 16, generator=generator))[
        torch.randperm(32, generator=generator)
    ]
    order = balanced_kmeans(rows, 8)
    planted = torch.cdist(rows, centres).argmin(1)
    assert all(len(set(planted[group].tolist())) == 1 for group in order.unflatten(0, (-1, 8)))
    assert within(rows, order, 8) < 0.5 * within(rows, random_groups(32), 8)


def test_on_a_few_rows_it_comes_near_the_best_of_all_groupings() -> None:
    rows = torch.randn(8, 3, generator=torch.Generator().manual_seed(5))
    best = min(
        within(rows, torch.tensor([*first, *(n for n in range(8) if n not in first)]), 4)
        for first in itertools.combinations(range(8), 4)
    )
    assert within(rows, balanced_kmeans(rows, 4), 4) <= 1.1 * best


def test_equal_rows_and_sizes_that_do_not_divide() -> None:
    assert balanced_kmeans(torch.ones(6, 2), 2).tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="5 rows cannot be cut into clusters of 2"):
        balanced_kmeans(torch.ones(5, 2), 2)
