"""Which of a model's masks the kernels apply."""

from __future__ import annotations

from typing import Any

from torch import nn

from sparsify.models import SiteRule, site_rules

BLOCK_SITES = ("ffn_in", "gate", "inter")
"""Sites inside a feed-forward block that the kernels mask, by thresholds."""
STEP_SITES = ("attn_in", "attn_out")
"""The same for a decoding step's attention."""


def is_masked_linear(module: nn.Module) -> bool:
    """Whether a projection has a mask or a remainder of its own. A bundle's classes are its own, so they are known by name."""
    return type(module).__name__ == "MaskedLinear"


def is_readable(module: nn.Module) -> bool:
    """Whether the kernels can read a projection's weights."""
    return (type(module) is nn.Linear or is_masked_linear(module)) and module.bias is None


def unknown_to_blocks(config: Any) -> str:
    """The first mask of a model's feed-forward blocks that the kernels do not apply, in words; or nothing."""
    return _first(config, (*BLOCK_SITES, "ffn_in.gate", "ffn_in.up", "up"), BLOCK_SITES)


def unknown_to_steps(config: Any) -> str:
    """The same for the attention of a decoding step."""
    return _first(config, (*STEP_SITES, "attn_in.q", "attn_in.k", "attn_in.v"), STEP_SITES)


def _first(config: Any, sites: tuple[str, ...], known: tuple[str, ...]) -> str:
    for site, rule in site_rules(config).items():
        if site in sites and (site not in known or not _is_plain(rule)):
            turned = "rotated " if rule.rotated else ""
            remainder = "" if rule.remainder == "none" else f" with a {rule.remainder} remainder"
            return f"a {turned}{rule.rule} mask on {site}{remainder}"
    return ""


def _is_plain(rule: SiteRule) -> bool:
    return rule.rule == "threshold" and not rule.rotated and rule.remainder == "none"
