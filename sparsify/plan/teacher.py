"""Bytes that the dense source takes on every process while a run learns from it."""

from __future__ import annotations

from dataclasses import dataclass

from sparsify.plan.activations import value_bytes
from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe import Recipe


@dataclass(frozen=True)
class TeacherBytes:
    """Bytes of one process.

    Attributes:
        weights: Whole under every ZeRO stage, without gradients or moments.
        logits: Of one micro-batch, until the loss has its gradient.
        ffn_outputs: Of one micro-batch and every layer, until the next micro-batch.
    """

    weights: int = 0
    logits: int = 0
    ffn_outputs: int = 0


def teacher_bytes(
    recipe: Recipe, architecture: Architecture, parameters: Parameters
) -> TeacherBytes:
    """What distillation keeps; nothing where the recipe distils nothing."""
    settings, training = recipe.distillation, recipe.training
    if not settings.is_on:
        return TeacherBytes()
    value = value_bytes(recipe)
    each = value * training.micro_batch_windows * training.window_tokens
    return TeacherBytes(
        weights=value * parameters.total,
        logits=each * architecture.vocab_size if settings.logits_weight else 0,
        ffn_outputs=each * architecture.hidden_size * architecture.num_hidden_layers
        if settings.ffn_weight
        else 0,
    )
