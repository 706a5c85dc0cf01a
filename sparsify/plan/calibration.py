"""Memory and disk that the calibrated swap of a recipe takes, before training starts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sparsify.conversion.hidden_states import CHUNK_TOKENS
from sparsify.plan.parameters import Architecture
from sparsify.recipe import Recipe, token_shares

FP32_BYTES, FP64_BYTES = 4, 8
LIVING_STREAMS = 6
"""Residual streams on the disk at once: dense and converted before the layer and after it, and the two that a layer works with."""
GRAM_COPIES = 2
"""The matrix and its Cholesky factor."""
RIGHT_HAND_SIDES = 3
"""The sums, the right-hand side and the solution."""
NEURON_COPIES = 6
"""Gate, up, their factors, the product and a working copy."""


class CalibrationPlan(BaseModel):
    """What one calibration takes.

    Attributes:
        memory_bytes: One layer's weights, the Gram matrix and a chunk of tokens; on the GPU where there is one.
        disk_bytes: Residual streams, and the bare swap's checkpoint.
        num_tokens: Tokens that it runs through every layer, those that are only watched among them.
    """

    model_config = ConfigDict(frozen=True)

    memory_bytes: int
    disk_bytes: int
    num_tokens: int


def plan_calibration(
    recipe: Recipe, architecture: Architecture, model_bytes: int
) -> CalibrationPlan | None:
    """The calibration of a recipe; None where it has none.

    Args:
        recipe: The recipe.
        architecture: The model.
        model_bytes: Size of its checkpoint on the disk.
    """
    if not recipe.conversion.calibration_tokens:
        return None
    a, window_tokens = architecture, recipe.training.window_tokens
    num_experts = a.num_local_experts or 1
    ffn = num_experts * 3 * a.hidden_size * a.intermediate_size
    attention = 2 * a.hidden_size * (a.query_size + a.key_value_size)
    # Beside the dense block stand up and down with their signs turned, and the refitted down.
    weights = FP32_BYTES * (2 * ffn + attention)
    gram = (
        FP64_BYTES
        * a.intermediate_size
        * (GRAM_COPIES * a.intermediate_size + RIGHT_HAND_SIDES * a.hidden_size)
    )
    chunk = max(CHUNK_TOKENS, window_tokens)
    rows = FP32_BYTES * chunk * (NEURON_COPIES * a.intermediate_size + 8 * a.hidden_size)
    watched = recipe.eval.validation_windows_per_source * len(token_shares(recipe.mixture))
    num_tokens = recipe.conversion.calibration_tokens + watched * window_tokens
    streams = LIVING_STREAMS * FP32_BYTES * num_tokens * a.hidden_size
    return CalibrationPlan(
        memory_bytes=weights + gram + rows,
        disk_bytes=streams + 2 * model_bytes,
        num_tokens=num_tokens,
    )
