"""The parts of a model's masks, as the kernels read them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparsify.models.masking import is_fused, kept_count, site_rules
from sparsify.models.quantised import BlockMatrix, KeptBlocks
from sparsify.runtime.weights import Copies, Router


def is_masked_linear(module: nn.Module) -> bool:
    """Whether a projection has a mask or a remainder of its own. A bundle's classes are its own, so they are known by name."""
    return type(module).__name__ == "MaskedLinear"


def is_readable(module: nn.Module, *, with_bias: bool = False) -> bool:
    """Whether the kernels can read a projection's weights, and its bias if it has one."""
    return (type(module) is nn.Linear or is_masked_linear(module)) and (with_bias or module.bias is None)


def unknown_to_blocks(config: Any) -> str:
    """The first mask of a model that the kernels do not apply, in words; or nothing."""
    unknown = [
        f"a mask by {rule.words} on {site}"
        for site, rule in site_rules(config).items()
        if rule.by_proxy and rule.rule != "threshold"
    ]
    return next(iter(unknown), "")


def own_part(block: Any, projection: str) -> Any:
    """What holds the mask and the remainder that belong to one projection of a block alone: `gate`, `up` or `down`; or None."""
    if is_fused(block):
        return getattr(block, f"{projection}_proj_mask", None)
    module = getattr(block, f"{projection}_proj")
    return module if is_masked_linear(module) else None


def own_mask(module: Any) -> Any:
    """The mask on the input of a projection alone, given what `own_part` gives, or a linear layer; or None."""
    return getattr(module, "input_mask", None)


def constant_of(module: Any) -> torch.Tensor | None:
    """What is added to the outputs of a projection, given the same: in place of dropped inputs, and as its bias."""
    constant, bias = getattr(module, "remainder_constant", None), getattr(module, "bias", None)
    if constant is None or bias is None:
        return bias if constant is None else constant
    return constant.float() + bias.float()


def low_rank_of(module: Any, expert: int = 0) -> tuple[torch.Tensor, torch.Tensor] | None:
    """left [outputs, rank] and right [rank, inputs] of what replaces the dropped elements, given the same; None without."""
    left, right = (getattr(module, f"remainder_{name}", None) for name in ("left", "right"))
    if left is None or right is None:
        return None
    return (left[expert], right[expert]) if left.dim() > 2 else (left, right)


def router_of(block: Any, expert: int) -> Router | None:
    """What chooses groups of neurons of a block, or of an expert; None where nothing does. Bundles of older versions have no routers."""
    own = getattr(block, "group_router", None)
    if own is None:
        return None
    own = own.of_expert(expert) if is_fused(block) else own
    weight, bias = own.router.detach(), own.bias.detach().float()
    if own.rule.rule == "router_top_k":
        return Router(weight, bias, kept_count(float(own.kept_share), len(bias)))
    return Router(weight, bias - torch.logit(own.threshold.float()))


def copies_of(block: Any, index: int, halves: Iterable[tuple[KeptBlocks, torch.Tensor]]) -> Copies:
    """The int4 copies that rank neurons of a block, or of an expert.

    Args:
        block: With such a mask.
        index: Of the expert; 0 in a dense block.
        halves: Where copies are kept, and of which weights: gate and up, or both in one.
    """
    found = list[BlockMatrix]()
    for kept, weight in halves:
        (one,) = kept.of(index, [weight], lambda weight=weight: [weight])
        # A bundle's classes are its own.
        found += [BlockMatrix(data, "int4", one.columns) for data in one.data.split(block.config.intermediate_size)]
    gate, up = found
    return Copies(gate, up, float(block.ffn_activation.inter_mask.threshold))


def thresholds_of(block: Any, expert: int | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Thresholds of a block's masks, or of one expert, and masks that are others. Bundles of older versions have no gate mask."""
    own = block.ffn_activation
    masks = {site: mask for site in ("gate", "up", "inter") if (mask := getattr(own, f"{site}_mask", None)) is not None}
    if getattr(block, "by_proxy", False):
        masks.pop("inter")  # the copies apply it
    thresholds = {"thresholds": getattr(own, "threshold", None), "gate_thresholds": None}
    if "gate" in masks and hasattr(masks["gate"], "threshold"):
        thresholds["gate_thresholds"] = masks.pop("gate").threshold
    if expert is None:
        return thresholds, masks
    return {
        name: values[expert] if values is not None and values.dim() > 1 else values
        for name, values in thresholds.items()
    }, {site: mask.of_expert(expert) for site, mask in masks.items()}


def bases_of(*masks: Any) -> list[torch.Tensor]:
    """The rotations among masks, some of which may be the same or None, each once."""
    found = {id(mask): getattr(mask, "basis", None) for mask in masks}
    return [basis for basis in found.values() if basis is not None]


def num_bytes(tensors: Iterable[torch.Tensor] | None) -> int:
    """Their memory; 0 without any."""
    return sum(one.nbytes for one in tensors or ())
