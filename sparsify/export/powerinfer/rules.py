"""What PowerInfer can hold, and what it would run wrongly without a word.

Its `bamboo` architecture is the only one that computes dReLU: a Mistral without a sliding window. Its loader checks little, so
everything that it would misread is refused here, with the reason.
"""

from __future__ import annotations

from typing import Any

from sparsify.errors import ExportError
from sparsify.models import ACTIVATIONS, SparseConfig, SparseMistralConfig

FFN_TYPES = ("f16", "q4_0")
"""Types of ffn_down_t that the engine's kernel reads; it takes any other for F16 and prints nonsense."""
BLOCK_VALUES = 32
"""Values of one block of Q4_0."""
VECTOR_VALUES = 8
SPLIT_NEURONS = 256
"""Neurons that the engine moves to a GPU at a time."""
FAST_NEURONS = 1000
"""Up to so many neurons a block counts as an attention head in the engine, and skips no rows of up and gate."""


def check_holdable(config: SparseConfig, ffn_type: str, context_tokens: int | None) -> None:
    """Refuses a model that the engine cannot hold.

    Args:
        config: Of the model.
        ffn_type: One of FFN_TYPES.
        context_tokens: The longest context that the file shall allow; the model's own if None.

    Raises:
        ExportError: With the reason.
    """
    reasons = [
        *_architecture(config),
        *_activation(config),
        *_shapes(config, ffn_type),
        *_positions(config, context_tokens),
    ]
    if reasons:
        raise ExportError(
            "PowerInfer cannot hold this model:\n" + "\n".join(f"- {reason}" for reason in reasons),
            allowed="A dense dReLU model of Mistral's shape; docs/powerinfer.md lists what the engine takes.",
            next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model.",
        )


def notes(config: SparseConfig) -> list[str]:
    """What the engine computes rightly but not fast."""
    if config.intermediate_size > FAST_NEURONS:
        return []
    return [
        f"{config.intermediate_size} neurons a layer are few: up to {FAST_NEURONS} the engine computes right numbers, but "
        "skips no rows of up and gate."
    ]


def _architecture(config: SparseConfig) -> list[str]:
    if isinstance(config, SparseMistralConfig):
        return []
    return ["it is a mixture of experts, and the engine has none"]


def _activation(config: SparseConfig) -> list[str]:
    reasons = []
    activation = ACTIVATIONS[config.ffn_activation]
    if (activation.gate, activation.up) != ("relu", "relu"):
        reasons.append(
            f"its activation is {activation.name}, {activation.formula}: the bamboo architecture computes dReLU only, "
            "and would run it as dReLU, another function"
        )
    thresholds = getattr(config, "ffn_thresholds", "none")
    if thresholds != "none":
        reasons.append(
            f"its activations are cut at fitted thresholds (ffn_thresholds={thresholds}), which the engine does not know"
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
        reasons.append(
            f"head_dim is {head}, and the engine takes hidden_size / heads = {hidden / heads:g} for it"
        )
    if hidden % VECTOR_VALUES:
        reasons.append(
            f"hidden_size is {hidden}: its down kernel reads {VECTOR_VALUES} values at a time, past the end of a row"
        )
    if ffn_type == "q4_0" and (hidden % BLOCK_VALUES or neurons % BLOCK_VALUES):
        reasons.append(
            f"q4_0 has blocks of {BLOCK_VALUES}: hidden_size {hidden} and intermediate_size {neurons} must be multiples of it"
        )
    return reasons


def _positions(config: SparseConfig, context_tokens: int | None) -> list[str]:
    reasons = []
    context = context_tokens or config.max_position_embeddings
    sequence = getattr(config, "sliding_window", None)
    if sequence is not None and sequence < context:
        reasons.append(
            f"it attends to the last {sequence:,} of {context:,} tokens, and the engine to all; up to {sequence:,} tokens both are "
            f"the same: --context-tokens {sequence}"
        )
    if context > config.max_position_embeddings:
        reasons.append(
            f"--context-tokens is {context:,}, the model was made for {config.max_position_embeddings:,}"
        )
    rope: dict[str, Any] = config.rope_parameters or {}  # pyright: ignore[reportAssignmentType]
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its rotary positions are scaled ({rope['rope_type']})")
    return reasons
