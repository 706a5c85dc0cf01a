"""Greedy shares within a layer (as TEAL's, arXiv 2408.14690): which sites drop how much, by what that does to the layer's output.

From no zeros on, the site whose further step harms the layer's output least gets it, until the layer has the wanted share. A step
drops as many weights at each site, so small projections take large steps. The harm is the mean over tokens of the distance of the
output from the dense layer's, for every weight that the step saves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from sparsify.methods.base import LayerValues

PartsOf = Callable[[str, float], dict[str, torch.Tensor]]
"""A site and a share of zeros above 0, to the parts of its mask."""


def greedy_shares(
    layer: LayerValues, weights: Mapping[str, int], parts_of: PartsOf, share: float, step: float, num_tokens: int
) -> dict[str, float]:
    """Share of zeros of each site, with which the layer leaves the wanted share of its weights unread.

    Args:
        layer: A layer in front of all these sites.
        weights: Weights that read each site, counted on whatever scale. Of experts those that a token reads.
        parts_of: Gives the masks that are compared.
        share: Share of zeros wanted of all weights, 0 to below 1.
        step: Largest step of a site, as a share of the weights of the largest.
        num_tokens: Tokens to compare the layer's outputs on.
    """
    shares = dict.fromkeys(weights, 0.0)
    unit, missing = step * max(weights.values()), share * sum(weights.values())
    dense = layer.output({}, num_tokens)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    error = 0.0
    # The last step fills up the rest, however small; what rounding leaves of it is none.
    while missing > 1e-9 * unit:
        best: tuple[float, str, float, dict[str, torch.Tensor], float] | None = None
        for site, size in weights.items():
            saved = min(unit, missing, (1 - shares[site]) * size)
            if saved <= 1e-9 * unit:
                continue
            raised = min(1.0, shares[site] + saved / size)
            candidate = parts_of(site, raised)
            after = float((layer.output(parts | {site: candidate}, num_tokens) - dense).norm(dim=-1).mean())
            harm = (after - error) / saved
            if best is None or harm < best[0]:
                best = harm, site, raised, candidate, after
        assert best is not None, "a share below 1 is reached before all sites are full"
        _, site, raised, parts[site], error = best
        missing -= (raised - shares[site]) * weights[site]
        shares[site] = raised
    return shares
