"""What PowerInfer supports, and what it would silently compute wrongly.

`bamboo` is its only architecture with dReLU: Mistral without sliding-window attention. PowerInfer's loader checks little, so
everything that it would misread is refused here, with the reason.
"""

from __future__ import annotations

from typing import Any

from sparsify.errors import ExportError
from sparsify.models import ACTIVATIONS, SparseConfig, SparseMistralConfig, site_rules

FFN_TYPES = ("f16", "q4_0")
"""Types of ffn_down_t that the engine's kernel reads; it reads any other type as F16 and generates garbage."""
BLOCK_VALUES = 32
"""Values in one block of Q4_0."""
VECTOR_VALUES = 8
SPLIT_NEURONS = 256
"""Number of neurons that the engine moves to a GPU at once."""
FAST_NEURONS = 1000
"""Up to this many neurons, the engine treats a block like an attention head and does not skip rows of up and gate."""


def check_holdable(config: SparseConfig, ffn_type: str, context_tokens: int | None) -> None:
    """Checks that the engine supports a model.

    Args:
        config: Config of the model.
        ffn_type: One of FFN_TYPES.
        context_tokens: Maximum context of the file; None for the model's.

    Raises:
        ExportError: With the reasons, if it does not.
    """
    reasons = [
        *_architecture(config),
        *_activation(config),
        *_shapes(config, ffn_type),
        *_positions(config, context_tokens),
    ]
    if reasons:
        raise ExportError(
            "PowerInfer does not support this model:\n" + "\n".join(f"- {reason}" for reason in reasons),
            allowed="A dReLU model with Mistral's architecture, without experts; see docs/powerinfer.md.",
            next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model.",
        )


def notes(config: SparseConfig) -> list[str]:
    """Notes on what the engine computes correctly but not fast."""
    if config.intermediate_size > FAST_NEURONS:
        return []
    return [
        f"The layers have only {config.intermediate_size} neurons: up to {FAST_NEURONS}, the engine computes correctly but does "
        "not skip rows of up and gate."
    ]


def _architecture(config: SparseConfig) -> list[str]:
    if isinstance(config, SparseMistralConfig):
        return []
    return ["it is a mixture of experts, which the engine does not support"]


def _activation(config: SparseConfig) -> list[str]:
    reasons = []
    activation = ACTIVATIONS[config.ffn_activation]
    if (activation.gate, activation.up) != ("relu", "relu"):
        reasons.append(
            f"its activation is {activation.name}, {activation.formula}, which the bamboo architecture would compute as "
            "dReLU"
        )
    if config.sparsification:
        sites = ", ".join(site_rules(config))
        reasons.append(
            f"it stores a mask of {config.sparsification['method']} on {sites}, which the engine does not support"
        )
    return reasons


def _shapes(config: SparseConfig, ffn_type: str) -> list[str]:
    hidden, neurons, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    head = getattr(config, "head_dim", None) or hidden // heads
    reasons = []
    if head * heads != hidden:
        reasons.append(f"head_dim is {head}, but the engine assumes hidden_size / heads = {hidden / heads:g}")
    if hidden % VECTOR_VALUES:
        reasons.append(
            f"hidden_size is {hidden}; the engine's down kernel reads {VECTOR_VALUES} values at once, past the end of a row"
        )
    if ffn_type == "q4_0" and (hidden % BLOCK_VALUES or neurons % BLOCK_VALUES):
        reasons.append(
            f"q4_0 has blocks of {BLOCK_VALUES} values; hidden_size {hidden} and intermediate_size {neurons} must be multiples of that"
        )
    return reasons


def _positions(config: SparseConfig, context_tokens: int | None) -> list[str]:
    reasons = []
    context = context_tokens or config.max_position_embeddings
    sequence = getattr(config, "sliding_window", None)
    if sequence is not None and sequence < context:
        reasons.append(
            f"it attends to the last {sequence:,} of {context:,} tokens, but the engine to all of them; up to {sequence:,} tokens "
            f"they agree: --context-tokens {sequence}"
        )
    if context > config.max_position_embeddings:
        reasons.append(
            f"--context-tokens is {context:,}, but the model's maximum is {config.max_position_embeddings:,}"
        )
    rope: dict[str, Any] = config.rope_parameters or {}  # pyright: ignore[reportAssignmentType]
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its rotary positions are scaled ({rope['rope_type']})")
    return reasons
