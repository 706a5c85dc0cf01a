"""Which of a model's masks the kernels apply."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsify.models import SiteRule, site_rules
from sparsify.models.masking import INPUT_SITES, is_fused

BLOCK_SITES = ("ffn_in", "ffn_in.gate", "ffn_in.up", "gate", "inter")
"""Sites inside a feed-forward block that the kernels mask: `gate` and `inter` by thresholds, inputs by every rule."""
STEP_SITES = ("attn_in", "attn_in.q", "attn_in.k", "attn_in.v", "attn_out")
"""Sites of the attention that a decoding step masks, by every rule."""


def is_masked_linear(module: nn.Module) -> bool:
    """Whether a projection has a mask or a remainder of its own. A bundle's classes are its own, so they are known by name."""
    return type(module).__name__ == "MaskedLinear"


def is_readable(module: nn.Module) -> bool:
    """Whether the kernels can read a projection's weights."""
    return (type(module) is nn.Linear or is_masked_linear(module)) and module.bias is None


def unknown_to_blocks(config: Any) -> str:
    """The first mask of a model's feed-forward blocks that the kernels do not apply, in words; or nothing."""
    return _first(config, (*BLOCK_SITES, "up"), BLOCK_SITES)


def unknown_to_steps(config: Any) -> str:
    """The same for the attention of a decoding step."""
    return _first(config, STEP_SITES, STEP_SITES)


def _first(config: Any, sites: tuple[str, ...], known: tuple[str, ...]) -> str:
    for site, rule in site_rules(config).items():
        if site in sites and (site not in known or not _is_known(site, rule)):
            turned = "rotated " if rule.rotated else "proxied " if rule.by_proxy else ""
            remainder = "" if rule.remainder == "none" else f" with a {rule.remainder} remainder"
            return f"a {turned}{rule.rule} mask on {site}{remainder}"
    return ""


def _is_known(site: str, rule: SiteRule) -> bool:
    applies = rule.rule == "threshold" or site in INPUT_SITES
    return applies and not rule.rotated and not rule.by_proxy and rule.remainder in ("none", "constant")


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
    """What is added to the outputs of a projection, given the same."""
    return getattr(module, "remainder_constant", None)
