"""Masks that a model stores: which elements of which vector are set to zero for a token.

`config.sparsification` names the method that fitted them and, for each site, the rule:

    {"method": "percentile", "sites": {"inter": {"rule": "threshold", "per": "layer"}}}

A site is the vector that a mask multiplies. The rule `threshold` keeps an element where its magnitude exceeds a stored number
(`per: layer`) or a number of its own (`per: channel`; in fused experts, of its expert and its own). The numbers are buffers:
stored with the weights, never trained. A threshold of -inf keeps everything, bit by bit; NaN is kept, so that it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SITES = ("attn_in", "attn_out", "ffn_in", "gate", "inter")
"""In the order in which a layer computes them: input of the query, key and value projections, input of the output
projection, input of the gate and up projections, the gate's factor, and the product of both factors."""
INPUT_SITES = ("attn_in", "attn_out", "ffn_in")
"""Those that are inputs of linear projections; a `ThresholdMask` masks each. The others are inside `FfnActivation`."""
RULES = ("threshold",)
GRANULARITIES = ("layer", "channel")


@dataclass(frozen=True)
class SiteRule:
    """How the elements of one site are chosen.

    Attributes:
        rule: One of RULES.
        per: `layer` for one number, `channel` for one for each element (of each expert, inside experts).
    """

    rule: str = "threshold"
    per: str = "layer"


def site_rules(config: Any) -> dict[str, SiteRule]:
    """The rule of each masked site of a model, in the order of SITES; empty without a mask.

    Raises:
        ValueError: If the configuration names a site or a rule that this code does not apply.
    """
    stored = getattr(config, "sparsification", None)
    if not stored:
        return {}
    rules = {}
    for site, fields in stored["sites"].items():
        rule = SiteRule(**fields)
        for what, given, known in (
            ("site", site, SITES),
            ("rule", rule.rule, RULES),
            ("granularity", rule.per, GRANULARITIES),
        ):
            if given not in known:
                raise ValueError(
                    f"sparsification has the {what} {given!r}, which this model does not apply; known: {', '.join(known)}"
                )
        rules[site] = rule
    return {site: rules[site] for site in SITES if site in rules}


def read_mask(config: Any, other_fields: dict[str, Any]) -> None:
    """Checks a configuration's mask, which older bundles write as `ffn_thresholds: neuron`; takes that out of the other fields.

    Raises:
        ValueError: If this code does not apply it.
    """
    old = other_fields.pop("ffn_thresholds", "none")
    if old not in ("none", "neuron"):
        raise ValueError(f"ffn_thresholds is {old!r}; allowed: none, neuron")
    if old == "neuron":
        config.sparsification = {"method": "thresholds", "sites": {"inter": {"rule": "threshold", "per": "channel"}}}
    site_rules(config)


def num_experts(config: Any) -> int:
    """Experts of one layer; 1 in a dense model."""
    return getattr(config, "num_local_experts", None) or 1


def experts_per_token(config: Any) -> int:
    """Experts that a token is routed to; 1 in a dense model."""
    return config.num_experts_per_tok if num_experts(config) > 1 else 1


def is_fused(block: Any) -> bool:
    """Whether a feed-forward block holds all experts of its layer in one parameter."""
    return hasattr(block, "gate_up_proj")


def mask_tensors(config: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name inside a layer, and shape, of the thresholds of each masked site."""
    experts = getattr(config, "num_local_experts", None)
    ffn = "mlp.experts." if experts else "mlp."
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    per_expert = (experts,) if experts else ()
    places = {
        "attn_in": ("self_attn.input_mask.threshold", (config.hidden_size,)),
        "attn_out": (
            "self_attn.o_proj.input_mask.threshold",
            (config.num_attention_heads * head_dim,),
        ),
        "ffn_in": (f"{ffn}input_mask.threshold", (config.hidden_size,)),
        "gate": (
            f"{ffn}ffn_activation.gate_mask.threshold",
            (*per_expert, config.intermediate_size),
        ),
        "inter": (f"{ffn}ffn_activation.threshold", (*per_expert, config.intermediate_size)),
    }
    return {
        site: (places[site][0], places[site][1] if rule.per == "channel" else (1,))
        for site, rule in site_rules(config).items()
    }


def drop_small(x: torch.Tensor, threshold: torch.Tensor, experts: int | torch.Tensor | None = None) -> torch.Tensor:
    """x, set to zero where its magnitude does not exceed the threshold.

    Args:
        x: [..., channels].
        threshold: [1] or [channels], or [experts, channels].
        experts: The expert of all rows, or of each row: [rows]. Needed for thresholds of experts.

    Raises:
        ValueError: If it is needed and not given.
    """
    if threshold.dim() > 1:
        if experts is None:
            raise ValueError("These thresholds are of experts: say which expert each row belongs to")
        threshold = threshold[experts]
    return torch.where(x.detach().abs() <= threshold, 0.0, x)


class ThresholdMask(nn.Module):
    """Sets a vector to zero where its magnitude does not exceed a stored threshold."""

    threshold: torch.Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("threshold", torch.zeros(shape))

    def forward(self, x: torch.Tensor, experts: int | torch.Tensor | None = None) -> torch.Tensor:
        """The masked vector, of the shape of x; see `drop_small`."""
        return drop_small(x, self.threshold, experts)


def install_input_masks(layer: nn.Module, block: Any, config: Any) -> None:
    """Gives a layer the masks on the inputs of its linear projections, as the configuration says.

    The attention's own code stays: hooks mask what its projections get. A block's input is masked by the block.
    """
    shapes = {site: shape for site, (_, shape) in mask_tensors(config).items()}
    attention: Any = layer.self_attn
    if "attn_in" in shapes:
        attention.input_mask = ThresholdMask(shapes["attn_in"])
        attention.register_forward_pre_hook(_mask_attention, with_kwargs=True)
    if "attn_out" in shapes:
        attention.o_proj.input_mask = ThresholdMask(shapes["attn_out"])
        attention.o_proj.register_forward_pre_hook(_mask_projection)
    block.input_mask = ThresholdMask(shapes["ffn_in"]) if "ffn_in" in shapes else None


# The hooks take their mask from the module that they are called with: a copy of the model must not share it.
def _mask_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (attention.input_mask(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": attention.input_mask(kwargs["hidden_states"])}


def _mask_projection(projection: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (projection.input_mask(args[0]), *args[1:])
