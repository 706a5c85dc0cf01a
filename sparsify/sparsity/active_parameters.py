"""Active parameters: how many parameters one token needs, by part of the model.

Published figures count the feed-forward blocks in two ways: only the neurons that fire, as if they were known in advance
(perfect predictor), or what an exact kernel reads to find them (the whole gate, then the rows that its zeros leave). They
also differ in whether embeddings count. This module computes all of these.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import nn

from sparsify.models import SparseConfig, SparseMistralConfig, SparseMixtralConfig, family_of
from sparsify.models.integer_linear import IntegerLinear
from sparsify.sparsity.schema import ActiveParameters, ActivePart, PublishedActive

FFN_PARTS = ("gate", "up", "down")
PARTS = ("attention", *FFN_PARTS, "router", "fusion", "norms", "head", "embeddings", "predictor")
_PART_OF = {
    "embed_tokens": "embeddings",
    "lm_head": "head",
    "self_attn": "attention",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "router": "router",
    "group_router": "router",
    "gate": "router",
    "attention_router": "router",
    "ffn_router": "router",
    "attention_fusion": "fusion",
    "ffn_fusion": "fusion",
}


def parameters_by_part(model: nn.Module) -> dict[str, int]:
    """Number of parameters of each of PARTS. A tied head counts once, as the embedding."""
    counts: Counter[str] = Counter(dict.fromkeys(PARTS, 0))
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if "gate_up_proj" in words:
            counts["gate"] += parameter.numel() // 2
            counts["up"] += parameter.numel() // 2
            continue
        part = next((_PART_OF[word] for word in words if word in _PART_OF), "norms")
        counts[part] += parameter.numel()
    for name, module in model.named_modules():
        if isinstance(module, IntegerLinear):  # their codes are buffers
            part = next(_PART_OF[word] for word in name.split(".") if word in _PART_OF)
            counts[part] += module.in_features * module.out_features
    return dict(counts)


def active_parameters(
    parts: dict[str, int], *, expert_share: float, gate_zeros: float, product_zeros: float, hidden_share: float = 1.0
) -> ActiveParameters:
    """The active parameters of one token: `expert_share` of the experts compute it, zeros are shares in these, and blocks read and
    write `hidden_share` of the hidden size.
    """
    firing = 1 - product_zeros
    perfect: dict[str, float] = dict.fromkeys(FFN_PARTS, expert_share * firing)
    gate_first: dict[str, float] = {
        "gate": expert_share,
        "up": expert_share * (1 - gate_zeros),
        "down": expert_share * firing,
    }
    width = {part: hidden_share if part in ("attention", *FFN_PARTS, "fusion") else 1.0 for part in PARTS}
    lines = [
        ActivePart(
            part=part,
            total=parts[part],
            perfect_predictor=round(parts[part] * width[part] * perfect.get(part, 1)),
            gate_first=round(parts[part] * width[part] * gate_first.get(part, 1)),
        )
        for part in PARTS
    ]
    return ActiveParameters(parts=lines)


def ffn_byte_shares(gate_zeros: float, product_zeros: float) -> tuple[float, float]:
    """Share of the computed blocks' feed-forward weights that one token reads.

    Returns:
        The share with an exact gate-first kernel (whole gate, up where the gate is not zero, down where the product is
        not), and the share with a perfect predictor, whose own weights are not counted.
    """
    return (1 + (1 - gate_zeros) + (1 - product_zeros)) / 3, 1 - product_zeros


@cache
def published() -> tuple[PublishedActive, ...]:
    """TurboSparse's figures (arXiv 2406.05955, section 6.2) next to ours for the same shapes and zeros.

    The zeros are those of the paper: 90% for Mistral-7B, 85% in the chosen experts of Mixtral-8x7B.
    """
    shape: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    mistral = SparseMistralConfig(
        **shape,
        ffn_activation="drelu",
    )
    mixtral = SparseMixtralConfig(
        **shape,
        num_local_experts=8,
        num_experts_per_tok=2,
        ffn_activation="drelu",
    )
    return (
        _published("TurboSparse-Mistral-7B", mistral, 1.0, 0.90, 2.5e9),
        _published("TurboSparse-Mixtral-47B", mixtral, 0.25, 0.85, 4.3e9),
    )


def _published(
    name: str,
    config: SparseConfig,
    expert_share: float,
    zeros: float,
    claimed: float,
) -> PublishedActive:
    with torch.device("meta"):
        parts = parameters_by_part(family_of(config).model(config))
    # The paper does not give the zeros of the gate. Assume that gate and up are independent and equally sparse.
    gate_zeros = 1 - (1 - zeros) ** 0.5
    active = active_parameters(parts, expert_share=expert_share, gate_zeros=gate_zeros, product_zeros=zeros)
    ffn = sum(parts[part] for part in FFN_PARTS) * expert_share
    rest = active.perfect_predictor - ffn * (1 - zeros)
    return PublishedActive(
        name=name,
        claimed=round(claimed),
        zeros=zeros,
        perfect_predictor=active.perfect_predictor,
        gate_first=active.gate_first,
        zeros_of_claim=1 - (claimed - rest) / ffn,
    )
