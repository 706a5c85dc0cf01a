"""What PowerInfer supports, and what it would silently compute wrongly.

`bamboo` is its only architecture with dReLU: Mistral without sliding-window attention. PowerInfer's loader checks little, so
everything that it would misread is refused here, with the reason.
"""

from __future__ import annotations

from typing import Any

from sparsify.errors import ExportError
from sparsify.export.context import context_reasons
from sparsify.models import ACTIVATIONS, SparseConfig, site_rules
from sparsify.models.masking import has_experts

BAMBOO = ("sparse_mistral", "sparse_llama")
"""Model types that the engine's architecture computes."""
FFN_TYPES = ("f16", "q4_0")
"""Types of ffn_down_t that the engine's kernel reads; it reads any other type as F16 and generates garbage."""
BLOCK_VALUES = 32
"""Values in one block of Q4_0 or Q8_0."""
REST_TYPES = ("f16", "q8_0", "q4_0")
"""Types of attention, embedding and head, whose kernels read any type."""
VECTOR_VALUES = 8
SPLIT_NEURONS = 256
"""Number of neurons that the engine moves to a GPU at once."""
SMALL_NEURONS = 1000
"""Up to this many neurons, the engine takes another kernel, which drops blocks of 128 rows of up and gate by the scores of
the first neurons on the first token: a perplexity of 72.3 where the model has 33.3."""

NEURON_SITES = ("gate", "inter")
"""Sites whose thresholds the engine drops: its predictors switch the neurons off instead."""
LARGEST_PRODUCT = {"f16": 65504.0, "q4_0": 65504.0 * 127}
"""Of both factors of a neuron, by the type of the down projection: its kernel rounds products to F16, or to blocks of Q8_0
whose scale is in F16. Beyond it, the outputs are not numbers."""


def check_largest_product(largest: float, ffn_type: str) -> list[str]:
    """A note if the largest product of some text is near the limit of the engine's kernel.

    Raises:
        ExportError: If it is beyond it, or not a number.
    """
    limit = LARGEST_PRODUCT[ffn_type]
    if not largest <= limit:
        raise ExportError(
            f"A neuron's product of gate and up reaches {largest:,.0f}, beyond the {limit:,.0f} that PowerInfer's kernel holds with "
            f"--ffn-type {ffn_type}: its outputs would not be numbers.",
            next_step="Use --ffn-type q4_0."
            if ffn_type == "f16" and largest <= LARGEST_PRODUCT["q4_0"]
            else "`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model.",
        )
    if largest > limit / 4:
        return [
            f"The largest product of a neuron's gate and up is {largest:,.0f}. Beyond {limit:,.0f}, which other text may reach, "
            "PowerInfer's outputs are not numbers."
        ]
    return []


def supported_context(config: SparseConfig) -> int:
    """The longest context in which the engine, which attends to all tokens, agrees with a model."""
    return min(
        getattr(config, "sliding_window", None) or config.max_position_embeddings, config.max_position_embeddings
    )


def check_holdable(config: SparseConfig, ffn_type: str, context_tokens: int | None, rest_type: str = "f16") -> None:
    """Raises ExportError, with the reasons, if the engine does not support a model."""
    reasons = [
        *_architecture(config),
        *_activation(config),
        *_shapes(config, ffn_type, rest_type),
        *_positions(config, context_tokens),
    ]
    if reasons:
        raise ExportError(
            "PowerInfer does not support this model:\n" + "\n".join(f"- {reason}" for reason in reasons),
            allowed="A dReLU model with Mistral's architecture, without experts; see docs/powerinfer.md.",
            next_step="`sparsify export RUN --to DIR` writes the Hugging Face bundle of any model.",
        )


def stored_thresholds(config: SparseConfig) -> str:
    """What a model stores of thresholds on its neurons, in words; empty if it stores none."""
    sites = [site for site in site_rules(config) if site in NEURON_SITES]
    return f"thresholds of {(config.sparsification or {})['method']} on {', '.join(sites)}" if sites else ""


def _architecture(config: SparseConfig) -> list[str]:
    if has_experts(config):
        return ["it is a mixture of experts, which the engine does not support"]
    if config.model_type not in BAMBOO:
        return [f"it is a {config.model_type}, whose layers the bamboo architecture would compute as a Mistral's"]
    return []


def _activation(config: SparseConfig) -> list[str]:
    reasons = []
    activation = ACTIVATIONS[config.ffn_activation]
    if (activation.gate, activation.up) != ("relu", "relu"):
        reasons.append(
            f"its activation is {activation.name}, {activation.formula}, which the bamboo architecture would compute as "
            "dReLU"
        )
    if config.quantisation:
        reasons.append(f"it holds integers instead of weights, by {config.quantisation['method']}")
    other = [site for site in site_rules(config) if site not in NEURON_SITES]
    if other:
        method = (config.sparsification or {})["method"]
        reasons.append(f"it stores a mask of {method} on {', '.join(other)}, which the engine does not support")
    return reasons


def _shapes(config: SparseConfig, ffn_type: str, rest_type: str) -> list[str]:
    hidden, neurons, heads = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
    )
    head = getattr(config, "head_dim", None) or hidden // heads
    reasons = []
    if neurons <= SMALL_NEURONS:
        reasons.append(
            f"intermediate_size is {neurons}; up to {SMALL_NEURONS:,}, the engine takes another kernel, which gives wrong results"
        )
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
    elif rest_type != "f16" and hidden % BLOCK_VALUES:
        reasons.append(
            f"{rest_type} has blocks of {BLOCK_VALUES} values; hidden_size {hidden} must be a multiple of that"
        )
    return reasons


def _positions(config: SparseConfig, context_tokens: int | None) -> list[str]:
    reasons = context_reasons(config, context_tokens)
    rope: dict[str, Any] = config.rope_parameters or {}  # pyright: ignore[reportAssignmentType]
    if rope.get("rope_type", "default") != "default":
        reasons.append(f"its rotary positions are scaled ({rope['rope_type']})")
    return reasons
