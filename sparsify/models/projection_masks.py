"""Masks and remainders of single projections, and how a layer gets what it masks outside its activation (`masking.py`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .group_router import GroupRouter
from .masking import (
    GROUP,
    INPUT_SITES,
    READERS,
    SiteMask,
    SiteRule,
    is_fused,
    of_experts,
    ranks_by_proxy,
    site_parts,
    site_rules,
)
from .quantised import KeptBlocks, product, quantise


class ProjectionMask(nn.Module):
    """What masks do to one projection: a mask of its own on its input, and what replaces the dropped elements.

    Args:
        rule: Of the site that the projection reads; None where only an earlier site is masked.
        parts: The site's parts (`site_parts`); those of the mask itself only if it is the projection's own.
        projection: Name of the projection.
        own_input: Whether the mask on the input belongs to this projection alone.
    """

    input_mask: SiteMask | None
    remainder_constant: torch.Tensor | None
    remainder_left: torch.Tensor | None
    remainder_right: torch.Tensor | None

    def __init__(self, rule: SiteRule, parts: Mapping[str, tuple[int, ...]], projection: str, own_input: bool) -> None:
        super().__init__()
        add_projection_mask(self, rule, parts, projection, own_input)

    @classmethod
    def of(cls, module: Any) -> ProjectionMask:
        """The same mask and remainder as a module has."""
        own = cls(SiteRule(), {}, "", own_input=False)
        own.input_mask = module.input_mask
        for part in ("constant", "left", "right"):
            setattr(own, f"remainder_{part}", getattr(module, f"remainder_{part}"))
        return own

    def of_expert(self, expert: int) -> ProjectionMask:
        """Those of one expert, on the same tensors."""
        own = ProjectionMask.of(self)
        own.input_mask = self.input_mask if self.input_mask is None else self.input_mask.of_expert(expert)
        for part in ("constant", "left", "right"):
            values = getattr(self, f"remainder_{part}")
            if values is not None:
                setattr(own, f"remainder_{part}", values[expert])
        return own

    def forward(
        self, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], experts: int | None = None
    ) -> torch.Tensor:
        """`product` of the masked input, and the remainder."""
        return masked_product(self, x, product, experts)


class MaskedLinear(nn.Linear):
    """A linear projection with a `ProjectionMask`'s attributes, and with an int4 copy where neurons are ranked by proxy."""

    proxies: KeptBlocks | None = None

    def forward(self, input: torch.Tensor, by_proxy: bool = False) -> torch.Tensor:
        if by_proxy:
            return proxy_product(self, input, self.weight)
        return masked_product(self, input, super().forward)


@torch.no_grad()
def proxy_product(module: Any, x: torch.Tensor, weight: torch.Tensor, index: int = 0) -> torch.Tensor:
    """[..., outputs] of x [..., inputs] and the int4 copy of a weight, computed as decoding does.

    Copies are kept in `module.proxies`, one for each index, until torch counts a change of the weight. In training they are made each
    time: optimisers may write to weights unseen.
    """
    if module.training:
        module.proxies = KeptBlocks("int4")
        return product(x, quantise(weight, "int4"), by_columns=False)
    (matrix,) = module.proxies.of(index, [weight], lambda: [weight])
    return product(x, matrix, by_columns=False)


def add_projection_mask(
    module: Any, rule: SiteRule, parts: Mapping[str, tuple[int, ...]], projection: str, own_input: bool
) -> None:
    """Gives a module the attributes of a `ProjectionMask`; arguments as there."""
    module.input_mask = SiteMask(rule, parts) if own_input else None
    for part in ("constant", "left", "right"):
        shape = parts.get(f"{projection}.{part}")
        module.register_buffer(f"remainder_{part}", None if shape is None else torch.zeros(shape))


def masked_product(
    module: Any, x: torch.Tensor, product: Callable[[torch.Tensor], torch.Tensor], experts: int | None = None
) -> torch.Tensor:
    mask = module.input_mask
    masked = x if mask is None else mask(x, experts)
    output = product(masked)
    if module.remainder_left is not None:
        left, right = (of_experts(one, 2, experts) for one in (module.remainder_left, module.remainder_right))
        output = output + (x - masked) @ right.T @ left.T
    if module.remainder_constant is not None:
        output = output + of_experts(module.remainder_constant, 1, experts)
    return output


def install_masks(layer: Any, block: Any, config: Any) -> None:
    """Gives a layer the masks on the inputs of its linear projections, their remainders, and the router of groups, as the
    configuration says.

    The attention's own code stays. A block masks by itself what its projections share; those that have something of their own
    become `MaskedLinear`s. Fused experts get a `ProjectionMask` for each projection of which that holds.
    """
    block.input_mask = block.group_router = None
    if is_fused(block):
        block.gate_proj_mask = block.up_proj_mask = block.down_proj_mask = None
    for site, rule in site_rules(config).items():
        parts = site_parts(config, site, rule)
        if site == GROUP:
            block.group_router = GroupRouter(rule, parts)
        if site not in READERS:
            continue
        own_input = site in INPUT_SITES and len(READERS[site]) == 1
        if site == "attn_in":
            layer.self_attn.input_mask = SiteMask(rule, parts)
            layer.self_attn.register_forward_pre_hook(_mask_attention, with_kwargs=True)
        elif site == "ffn_in":
            block.input_mask = SiteMask(rule, parts)
        for projection in READERS[site]:
            if not own_input and rule.remainder == "none":
                continue
            if is_fused(block) and projection in ("gate_proj", "up_proj", "down_proj"):
                setattr(block, f"{projection}_mask", ProjectionMask(rule, parts, projection, own_input))
                continue
            home: Any = layer.self_attn if hasattr(layer.self_attn, projection) else block
            linear = getattr(home, projection)
            # Re-classing keeps the parameter, under meta-device loading and ZeRO-3 partitioned construction alike.
            linear.__class__ = MaskedLinear
            add_projection_mask(linear, rule, parts, projection, own_input)
    block.by_proxy = ranks_by_proxy(site_rules(config))
    if block.by_proxy and is_fused(block):
        block.proxies = KeptBlocks("int4")
    elif block.by_proxy:
        for linear in (block.gate_proj, block.up_proj):
            linear.__class__ = MaskedLinear
            add_projection_mask(linear, SiteRule(), {}, "", own_input=False)
            linear.proxies = KeptBlocks("int4")


# The hook takes its mask from the module that it is called with: a copy of the model must not share it.
def _mask_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (attention.input_mask(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": attention.input_mask(kwargs["hidden_states"])}
