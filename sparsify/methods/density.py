"""Weight density: the share of the weights of a model's linear projections that a token reads. Methods are compared at equal density.

Counted are the attention's query, key, value and output projection and the feed-forward block's gate, up and down, of a mixture
those of the experts that a token is routed to. Embedding, head, router and norms are not.

An element that a mask drops saves the weights that need not be read (the table in `methods/sites.py`). Masks on several sites of a
layer combine: the columns of an input and the rows that a factor saves multiply, as if they were independent; of the factors, the
one that drops more comes first, and the other is computed only where that was kept; down reads a neuron only where all of gate,
up and inter keep it, for which the smallest of their shares is taken. Groups that a router drops save their rows of gate and up and
their columns of down, and the router's matrix is read in addition. A rotated site reads n² weights in addition, for n
elements, and a low-rank remainder rank · (inputs + outputs) of each projection. A mask of `inter` by proxy saves the rows of gate and
up of what it drops, too, and reads 4.5 bits for each of their weights in addition, which count as those of 16: 0.28 weights.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsify.errors import RecipeError
from sparsify.methods.base import Mask, method_of
from sparsify.models import SiteRule
from sparsify.models.masking import (
    ALL_SITES,
    GROUP,
    INPUTS,
    READERS,
    experts_per_token,
    hidden_share,
    projection_shapes,
    ranks_by_proxy,
)
from sparsify.models.quantised import bits_per_weight
from sparsify.recipe.sparsification import ConversionSection

logger = logging.getLogger(__name__)

FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
STORED_BITS = 16
"""Of a weight, next to which those of proxies count; of fp32 weights they are half of what is counted."""
STEPS = 20
"""Halvings of the range in which target_zeros is searched: to a millionth."""


def weight_density(config: Any, kept: Mapping[str, float], rules: Mapping[str, SiteRule] | None = None) -> float:
    """Share of the weights of a model's linear projections that a token reads; above 1 if masks read more than they save.

    Args:
        config: Of the model: its shapes.
        kept: Share of the elements that is kept at each site, 0 to 1; sites that are missing keep everything.
        rules: Of the masks that are applied, for what they read in addition; none unless given.

    Raises:
        ValueError: If a site is unknown or a share is not one.
    """
    wrong = {site: share for site, share in kept.items() if site not in ALL_SITES or not 0 <= share <= 1}
    if wrong:
        raise ValueError(f"Kept shares of {wrong}; sites: {', '.join(ALL_SITES)}; shares: 0 to 1")
    shapes, experts = projection_shapes(config), experts_per_token(config)
    times = {name: experts if name in FFN_PROJECTIONS else 1 for name in shapes}
    columns = {name: kept[site] for site, names in INPUTS.items() for name in names if site in kept}
    gate, up = kept.get("gate", 1.0), kept.get("up", 1.0)
    columns["down_proj"] = min(gate, up, kept.get("inter", 1.0), kept.get(GROUP, 1.0))
    if (getattr(config, "quantisation", None) or {}).get("rotated_down"):
        columns["down_proj"] = 1.0  # a rotation leaves no zeros
    by_proxy = ranks_by_proxy(rules or {})
    rows = {"up_proj": gate} if gate <= up else {"gate_proj": up}
    if by_proxy:
        rows = dict.fromkeys(READERS["ffn_in"], columns["down_proj"])
    rows = {name: rows.get(name, 1.0) * kept.get(GROUP, 1.0) for name in READERS["ffn_in"]}
    sizes = {name: times[name] * outputs * inputs for name, (outputs, inputs) in shapes.items()}
    read = sum(size * columns.get(name, 1.0) * rows.get(name, 1.0) for name, size in sizes.items())
    read *= hidden_share(config)  # one side of every projection is the hidden size
    if by_proxy:
        read += bits_per_weight("int4") / STORED_BITS * sum(sizes[name] for name in READERS["ffn_in"])
    for site, rule in (rules or {}).items():
        if site == GROUP:
            neurons, hidden = shapes["gate_proj"]
            read += experts * neurons // rule.group_size * hidden
        if rule.rotated:
            read += shapes[READERS[site][0]][1] ** 2
        if rule.remainder == "low_rank":
            read += sum(times[name] * rule.rank_of(*shapes[name]) * sum(shapes[name]) for name in READERS[site])
    return read / sum(sizes.values())


def method_density(config: Any, conversion: ConversionSection) -> float:
    """Weight density that a conversion's mask aims at on a model of these shapes; arguments as of `with_target_zeros`.

    What it keeps at each site is its property `kept_shares`, if it has one; otherwise each site keeps all but `target_zeros`.

    Raises:
        RecipeError: If the method's settings are not valid.
    """
    mask = method_of(conversion)
    assert isinstance(mask, Mask), f"{conversion.method} is not a mask"
    assert conversion.target_zeros is not None, "there is no share of zeros"
    everywhere = dict.fromkeys(mask.sites, 1 - conversion.target_zeros)
    return weight_density(config, getattr(mask, "kept_shares", everywhere), mask.sites)


def with_target_zeros(conversion: ConversionSection, config: Any) -> ConversionSection:
    """A conversion with `target_zeros` in place of `target_density`: the smallest with which its mask, on a model of these shapes,
    reads no more. The same conversion if it has no target density.

    Args:
        conversion: With a mask as its method.
        config: Of the model: its shapes.

    Raises:
        RecipeError: If the method or a setting is not valid, or the method cannot reach this density, with the smallest that it can.
    """
    wanted = conversion.target_density
    if wanted is None:
        return conversion
    method_of(conversion)

    def at(zeros: float) -> ConversionSection:
        return replace(conversion, target_density=None, target_zeros=zeros)

    if wanted == 1.0:
        try:
            method_of(at(0.0))
        except RecipeError as error:
            raise RecipeError(
                f"conversion.target_density is 1, which masks nothing: {error.given}", allowed=error.allowed
            ) from error
        return at(0.0)
    low, high = 0, 2**STEPS
    densities: dict[int, float | None] = {}
    while high - low > 1:
        middle = (low + high) // 2
        try:
            densities[middle] = method_density(config, at(middle / 2**STEPS))
        except RecipeError:  # more zeros than the method allows
            densities[middle] = None
        density = densities[middle]
        if density is not None and density > wanted:
            low = middle
        else:
            high = middle
    if densities.get(high) is None:
        smallest = min(density for density in densities.values() if density is not None)
        raise RecipeError(
            f"conversion.target_density is {wanted:g}, and {conversion.method} cannot read so little of this model.",
            allowed=f"Above {smallest:.3f}, up to 1: the share of the weights of all linear projections that it reads at least.",
            next_step="Give a higher density, or a method or setting that masks more sites (docs/methods.md).",
        )
    zeros = high / 2**STEPS
    logger.info(f"{conversion.method} reads {densities[high]:.3f} of the weights with target_zeros={zeros:.4f}")
    return at(zeros)
