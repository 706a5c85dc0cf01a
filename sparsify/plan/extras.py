"""Memory and disk of work around training: calibrated replacement, refits at milestones, and the distillation teacher."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from sparsify.methods.base import upcycling_of
from sparsify.methods.layerwise import CHUNK_TOKENS
from sparsify.mixture.sequences.shares import token_shares
from sparsify.models.masking import num_experts
from sparsify.plan.activation_memory import value_bytes
from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe.recipe import Recipe

FP32_BYTES, FP64_BYTES = 4, 8
STORED_RESIDUALS = 6
"""Residual streams on disk at once: dense and converted, each before and after the layer, and two working copies."""
GRAM_COPIES = 2
"""The matrix and its Cholesky factor."""
RIGHT_HAND_SIDES = 3
"""The sums, the right-hand side and the solution."""
NEURON_COPIES = 6
"""Gate, up, both factors, the product and a working copy."""


SPARSEGPT_COPIES = 4
"""The sums, the factor of the Hessian, its inverse and the factor of that."""


class CalibrationPlan(BaseModel):
    """Memory and disk of one calibration.

    Attributes:
        method: What runs on the calibration tokens.
        memory_bytes: One layer's weights, the Gram matrix and a chunk of tokens; on the GPU where there is one. Of a method that makes
            another architecture: the dense model and the new one, in memory.
        disk_bytes: Residual streams, and the bare replacement's checkpoint.
        num_tokens: Tokens that run through every layer, including validation tokens.
        by_layer: Whether one layer is in memory at a time, or all are.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    memory_bytes: int
    disk_bytes: int
    num_tokens: int
    by_layer: bool = True


REFIT_RESIDUALS = 3
"""Residual streams of a refit: before and after its pass, and the inputs of a block."""


class RefitPlan(BaseModel):
    """Memory of the refits at milestones of a blending schedule.

    Attributes:
        memory_bytes: Memory of each process between two steps: one layer's feed-forward weights, the Gram matrix of one expert,
            a chunk of tokens, and the process's part of the residual stream; on the GPU if there is one.
        num_tokens: Tokens that each refit runs through every layer, over all processes.
    """

    model_config = ConfigDict(frozen=True)

    memory_bytes: int
    num_refits: int
    num_tokens: int


def plan_refits(recipe: Recipe, architecture: Architecture) -> RefitPlan | None:
    blending, a = recipe.blending, architecture
    if not blending.refit_milestones:
        return None
    # Three copies of three matrices: the originals, the sign-flipped and refitted ones, and the stacked experts for writing.
    weights = FP32_BYTES * 3 * num_experts(a) * 3 * a.hidden_size * a.intermediate_size
    mine = -(-blending.refit_tokens // recipe.launch.total_processes)
    stream = REFIT_RESIDUALS * value_bytes(recipe) * mine * a.hidden_size
    return RefitPlan(
        memory_bytes=weights + _fitting_bytes(a, min(CHUNK_TOKENS, mine)) + stream,
        num_refits=blending.refit_milestones,
        num_tokens=blending.refit_tokens,
    )


def _fitting_bytes(a: Architecture, chunk_tokens: int) -> int:
    """Gram matrix of one expert, its factor and right-hand sides, and a chunk of tokens."""
    gram = FP64_BYTES * a.intermediate_size * (GRAM_COPIES * a.intermediate_size + RIGHT_HAND_SIDES * a.hidden_size)
    return gram + FP32_BYTES * chunk_tokens * (NEURON_COPIES * a.intermediate_size + 8 * a.hidden_size)


def _pruning_bytes(a: Architecture, chunk_tokens: int) -> int:
    """What SparseGPT needs for the widest matrix: sums over its inputs and their factors, the matrix itself four times, and a chunk
    of tokens, widened to float64 as it is summed.
    """
    widest = max(a.intermediate_size, a.query_size, a.hidden_size)
    sums = SPARSEGPT_COPIES * FP64_BYTES * widest**2
    matrix = 4 * FP32_BYTES * a.hidden_size * widest
    return sums + matrix + FP32_BYTES * chunk_tokens * ((NEURON_COPIES + 4) * widest + 8 * a.hidden_size)


def num_zero_weights(recipe: Recipe, a: Architecture) -> int:
    """Weights of the projections that are zero while the model trains: those that the conversion makes, or the source has."""
    share = max(a.zero_share, recipe.conversion.weight_sparsity or 0.0)
    ffn = num_experts(a) * 3 * a.hidden_size * a.intermediate_size
    attention = 2 * a.hidden_size * (a.query_size + a.key_value_size)
    return round(share * a.num_hidden_layers * (ffn + attention))


def plan_calibration(recipe: Recipe, architecture: Architecture, model_bytes: int) -> CalibrationPlan | None:
    if not recipe.conversion.calibration_tokens:
        return None
    a, sequence_length = architecture, recipe.training.sequence_length
    ffn = num_experts(a) * 3 * a.hidden_size * a.intermediate_size
    attention = 2 * a.hidden_size * (a.query_size + a.key_value_size)
    # The dense block, sign-flipped up and down projections, and the refitted down projection.
    weights = FP32_BYTES * (2 * ffn + attention)
    watched = recipe.eval.validation_sequences_per_source * len(token_shares(recipe.mixture))
    num_tokens = recipe.conversion.calibration_tokens + watched * sequence_length
    if upcycling_of(recipe.conversion) is not None:
        copies = 2 * FP32_BYTES * (model_bytes // value_bytes(recipe))
        logits = 2 * FP32_BYTES * sequence_length * a.vocab_size
        return CalibrationPlan(
            method=recipe.conversion.method,
            memory_bytes=copies + logits,
            disk_bytes=model_bytes,
            num_tokens=num_tokens,
            by_layer=False,
        )
    streams = STORED_RESIDUALS * FP32_BYTES * num_tokens * a.hidden_size
    fitting = _pruning_bytes if recipe.conversion.weight_sparsity is not None else _fitting_bytes
    return CalibrationPlan(
        method=recipe.conversion.method,
        memory_bytes=weights + fitting(a, max(CHUNK_TOKENS, sequence_length)),
        disk_bytes=streams + 2 * model_bytes,
        num_tokens=num_tokens,
    )


@dataclass(frozen=True)
class TeacherBytes:
    """Bytes of the teacher on one process.

    Attributes:
        weights: Unpartitioned under every ZeRO stage, without gradients or moments.
        logits: Logits of one micro-batch, until the loss has its gradient.
        layer_outputs: Outputs of blocks, and of layers, of one micro-batch and all layers, until the next micro-batch.
    """

    weights: int = 0
    logits: int = 0
    layer_outputs: int = 0


def teacher_bytes(recipe: Recipe, architecture: Architecture, parameters: Parameters) -> TeacherBytes:
    """Memory of the teacher; zero without distillation."""
    settings, training = recipe.distillation, recipe.training
    if not settings.is_on:
        return TeacherBytes()
    value = value_bytes(recipe)
    each = value * training.micro_batch_size * training.sequence_length
    outputs = (settings.ffn_weight > 0) + (settings.squarehead_weight > 0)
    return TeacherBytes(
        weights=value * parameters.total,
        logits=each * architecture.vocab_size if settings.logits_weight else 0,
        layer_outputs=each * architecture.hidden_size * architecture.num_hidden_layers * outputs,
    )
