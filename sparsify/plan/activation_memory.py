"""Bytes of a forward and backward pass: saved activations of layers, and memory of the loss."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.models.activations import ACTIVATIONS
from sparsify.plan.parameters import Architecture
from sparsify.recipe.recipe import Recipe

FP32_BYTES = 4
MASK_BYTES = 1


@dataclass(frozen=True)
class Pass:
    """Bytes of one micro-batch on one process at three moments.

    Attributes:
        at_loss_bytes: Activations of all layers while the gradient of the logits is made.
        at_top_bytes: All layers' activations and the last layer's gradients, in the last layer's backward pass.
        at_bottom_bytes: The first layer's activations and gradients, in its backward pass.
        loss_logits_bytes: Logits, log-probabilities and their gradients; with Liger those of one chunk.
        kept_logits_bytes: Logits kept to the end of the backward pass; 0 with Liger.
    """

    at_loss_bytes: int
    at_top_bytes: int
    at_bottom_bytes: int
    loss_logits_bytes: int
    kept_logits_bytes: int

    @property
    def of_moment(self) -> tuple[int, int, int, int]:
        """Activations at the loss, at the top and at the bottom of the backward pass, and in the optimiser's step."""
        return self.at_loss_bytes, self.at_top_bytes, self.at_bottom_bytes, 0


def forward_and_backward(recipe: Recipe, architecture: Architecture, *, checkpointing: bool) -> Pass:
    """Bytes of one micro-batch with or without gradient checkpointing."""
    a, training = architecture, recipe.training
    value = value_bytes(recipe)
    tokens = training.micro_batch_size * training.sequence_length
    layer = layer_activation_bytes(
        a,
        recipe.activation.ffn_activation,
        value,
        training.sequence_length,
        thresholds=recipe.conversion.makes_mask,
        one_pass=training.fused_activation in ("triton", "inductor"),
        liger=training.liger_kernels,
    )
    layer += value * extra_neuron_values(recipe) * a.intermediate_size * a.num_experts_per_tok
    # Differences between the outputs of a block, and of a layer, and the teacher's.
    differences = (recipe.distillation.ffn_weight > 0) + (recipe.distillation.squarehead_weight > 0)
    layer += FP32_BYTES * a.hidden_size * differences
    kept = value * a.hidden_size if checkpointing else layer
    top = a.num_hidden_layers * kept + norm_bytes(a, value, liger=training.liger_kernels)
    working = layer_gradient_bytes(a, value) + (layer if checkpointing else 0)
    # log-softmax, its gradient and that of the chosen log-probabilities are fp32 in either precision.
    loss_logits = tokens * a.vocab_size * (value + 3 * FP32_BYTES)
    kept_logits = tokens * a.vocab_size * value
    if training.liger_kernels:
        loss_logits, kept_logits = liger_loss_bytes(a, value, tokens), 0
    return Pass(
        at_loss_bytes=tokens * top,
        at_top_bytes=tokens * (top + working),
        at_bottom_bytes=tokens * (layer + layer_gradient_bytes(a, value)),
        loss_logits_bytes=loss_logits,
        kept_logits_bytes=kept_logits,
    )


def liger_loss_bytes(architecture: Architecture, value_bytes: int, num_tokens: int) -> int:
    """Bytes of Liger's loss: logits of a chunk, which their gradient overwrites, and both gradients of the projection.

    A chunk has so many tokens that its logits are about as large as all hidden states, rounded up to a power of two. The
    weight's gradient is summed over chunks in fp32. In bf16 products are added directly, and the sum is rounded at the end; in
    fp32 a temporary holds each product first.
    """
    a = architecture
    chunks = -(-a.vocab_size // a.hidden_size)
    chunk_tokens = min(1 << (-(-num_tokens // chunks) - 1).bit_length(), num_tokens)
    hidden_gradient = num_tokens * a.hidden_size * value_bytes
    weight = a.vocab_size * a.hidden_size
    chunk, copy = chunk_tokens * a.vocab_size * value_bytes, weight * value_bytes
    temporary = chunk + copy if value_bytes == FP32_BYTES else max(chunk, copy)
    return hidden_gradient + FP32_BYTES * weight + temporary


def norm_bytes(architecture: Architecture, value_bytes: int, *, liger: bool) -> int:
    """Bytes per token that a norm saves for backward: its input in fp32, the normalised value and the output.

    Liger's norm saves the input in its own dtype and one fp32 number, and normalises again.
    """
    kept = value_bytes if liger else FP32_BYTES + value_bytes
    return architecture.hidden_size * (kept + value_bytes) + (FP32_BYTES if liger else 0)


def layer_activation_bytes(
    architecture: Architecture,
    ffn_activation: str,
    value_bytes: int,
    sequence_length: int | None,
    *,
    thresholds: bool = False,
    one_pass: bool = False,
    liger: bool = False,
) -> int:
    """Bytes per token that one layer saves for its backward pass.

    Counts as Korthikanti et al. (arXiv 2205.05198, section 4.1), without dropout and without attention scores, which fused
    attention recomputes. Counted are each norm's input, normalised value and output; queries, keys, values, the attention
    output and the log-sum-exp of each head; and `Activation.saved_values` of the feed-forward block.

    `sequence_length` is that of sequences that hold several documents: their attention mask is kept by every layer, and keys
    and values are repeated for every query head. With `one_pass` a fused kernel computes the activation; it saves gate, up and
    their product.
    """
    a = architecture
    norms = 2 * norm_bytes(a, value_bytes, liger=liger)
    keys_size = a.key_value_size if sequence_length is None else a.query_size
    attention = 2 * value_bytes * (a.query_size + keys_size) + FP32_BYTES * a.num_attention_heads
    attention += value_bytes * (sequence_length or 0)
    fused = bool(a.num_local_experts)
    activation = ACTIVATIONS[ffn_activation]
    neuron_values = 3 if one_pass else activation.saved_values[fused]
    neuron_bytes = value_bytes * neuron_values
    neuron_bytes += MASK_BYTES * (activation.saves_mask + thresholds)
    ffn = neuron_bytes * a.intermediate_size
    if fused:
        routed_copies = 2 * value_bytes * a.hidden_size
        ffn = a.num_experts_per_tok * (ffn + routed_copies)
    # Around both blocks: what the router made of its input, what the block wrote, and that after the first factor of the fusion.
    routed = 2 * 3 * value_bytes * a.hidden_size if a.sub_dimensions else 0
    return norms + attention + ffn + routed


def extra_neuron_values(recipe: Recipe) -> int:
    """Values per neuron that a layer saves in addition: both activations' factors while they are blended, the gate's factor once more
    for the penalty, and the product before it is multiplied by soft groups.
    """
    blending = 3 if recipe.blending.budget_share else 0
    return blending + (1 if recipe.penalty.gate_share else 0) + (1 if recipe.group_routing.soft_tokens else 0)


def layer_gradient_bytes(architecture: Architecture, value_bytes: int) -> int:
    """Bytes per token of the activation gradients that a layer's backward pass holds at once: those of the product and both
    factors, and of the residual stream before and after.
    """
    a = architecture
    return value_bytes * (3 * a.intermediate_size * a.num_experts_per_tok + 2 * a.hidden_size)


def value_bytes(recipe: Recipe) -> int:
    """Bytes of a weight and of an activation."""
    return 2 if recipe.training.precision == "bf16" else FP32_BYTES
