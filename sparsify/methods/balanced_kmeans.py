"""K-means with clusters of equal size: which neurons of a block form a group.

Lloyd's iteration with a balanced assignment in place of the nearest centre. The assignment is greedy, in rounds: every row that has no
cluster proposes to the nearest centre that has room, and every centre takes the nearest of those that propose, up to its size. A round
fills a cluster or is the last, so there are at most as many rounds as clusters. Optimal it is not; the best assignment of all iterations
is returned, by the sum of squared distances to the clusters' means. The same rows and seed give the same result.
"""

from __future__ import annotations

import torch

ITERATIONS = 25


@torch.no_grad()
def balanced_kmeans(rows: torch.Tensor, size: int, seed: int = 0) -> torch.Tensor:
    """An order of rows in which each `size` neighbours are a cluster.

    Args:
        rows: [rows, features].
        size: Rows of a cluster; must divide their number.
        seed: Of the first centres, which k-means++ draws (Arthur and Vassilvitskii, 2007).

    Returns:
        A permutation, int64 [rows] on the device of `rows`. Within a cluster, and of clusters by their first rows, the old order stays.

    Raises:
        ValueError: If the size does not divide the number of rows.
    """
    if size < 1 or len(rows) % size:
        raise ValueError(f"{len(rows)} rows cannot be cut into clusters of {size}")
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    centres = rows[_first_centres(rows, len(rows) // size, seed)]
    best, least = torch.arange(len(rows), device=rows.device), float("inf")
    for _ in range(ITERATIONS):
        clusters = balanced_assignment(_distances(rows, centres), size)
        order = torch.argsort(clusters, stable=True)
        spread = within(rows, order, size)
        if not spread < least:
            break
        best, least = order, spread
        centres = rows[order].unflatten(0, (-1, size)).mean(1)
    return _in_old_order(best, size)


def balanced_assignment(distances: torch.Tensor, size: int) -> torch.Tensor:
    """The cluster of each row, int64 [rows], so that every cluster gets `size` of them; see the module's text.

    Args:
        distances: Of every row to every centre, [rows, clusters], without NaN.
        size: rows / clusters.
    """
    num_rows, num_clusters = distances.shape
    clusters = torch.full((num_rows,), -1, dtype=torch.int64, device=distances.device)
    room = torch.full((num_clusters,), size, dtype=torch.int64, device=distances.device)
    while (free := torch.where(clusters < 0)[0]).numel():
        nearest, wanted = distances[free].masked_fill(room == 0, torch.inf).min(1)
        # By centre, and for each of them the nearest first; ties by the order of rows.
        by_distance = torch.argsort(nearest, stable=True)
        proposals = by_distance[torch.argsort(wanted[by_distance], stable=True)]
        counts = torch.bincount(wanted, minlength=num_clusters)
        starts = counts.cumsum(0) - counts
        rank = torch.arange(len(free), device=free.device) - starts[wanted[proposals]]
        taken = proposals[rank < room[wanted[proposals]]]
        clusters[free[taken]] = wanted[taken]
        room -= torch.bincount(wanted[taken], minlength=num_clusters)
    return clusters


def within(rows: torch.Tensor, order: torch.Tensor, size: int) -> float:
    """Sum of squared distances of rows to the means of their clusters, of an order as `balanced_kmeans` returns it."""
    grouped = rows[order].unflatten(0, (-1, size))
    return float((grouped - grouped.mean(1, keepdim=True)).double().square().sum())


def random_groups(num_rows: int, seed: int = 0) -> torch.Tensor:
    """A random order, int64 [rows]: what clusters are compared with."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))


def _first_centres(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(rows), (1,), generator=generator))]
    nearest = _distances(rows, rows[chosen])[:, 0]
    while len(chosen) < count:
        total = nearest.double().cumsum(0).cpu()
        at = torch.rand(1, dtype=torch.float64, generator=generator) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, at, right=True)), len(rows) - 1))
        nearest = torch.minimum(nearest, _distances(rows, rows[chosen[-1:]])[:, 0])
    return torch.tensor(chosen, device=rows.device)


def _distances(rows: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """Squared, [rows, centres]; never below 0."""
    squares = rows.square().sum(1, keepdim=True) + centres.square().sum(1)
    return (squares - 2 * rows @ centres.T).clamp_min(0)


def _in_old_order(order: torch.Tensor, size: int) -> torch.Tensor:
    clusters = order.unflatten(0, (-1, size)).sort(1).values
    return clusters[clusters[:, 0].argsort()].flatten()
