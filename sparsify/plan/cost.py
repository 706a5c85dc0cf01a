"""Time of a step, and time and price of a run, from a given throughput or from assumptions about the hardware."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from sparsify.plan.activation_memory import FP32_BYTES, value_bytes
from sparsify.plan.hardware import Hardware
from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe.recipe import Recipe

PASS_OVERHEAD_TOKENS = 512
"""Assumed fixed cost of a forward pass (kernel launches, small matrices), in tokens."""


class Cost(BaseModel):
    """Time and price of a run.

    Attributes:
        tokens_per_second: Throughput of all processes together.
        assumed: Whether it follows from `hardware`'s assumptions and not from a given number.
        hours: Training time, without conversion, validation, baseline run and report.
        device_hours: `hours` on all devices.
        price: US dollars.
    """

    model_config = ConfigDict(frozen=True)

    tokens_per_second: float
    assumed: bool
    hours: float
    device_hours: float
    price: float


def cost(
    recipe: Recipe,
    architecture: Architecture,
    parameters: Parameters,
    hardware: Hardware,
    tokens_per_second: float | None,
) -> Cost:
    assumed = tokens_per_second is None
    if tokens_per_second is None:
        seconds = step_seconds(recipe, architecture, parameters, hardware)
        tokens_per_second = recipe.step_tokens / seconds
    hours = recipe.num_steps * recipe.step_tokens / tokens_per_second / 3600
    devices = recipe.launch.total_processes
    return Cost(
        tokens_per_second=tokens_per_second,
        assumed=assumed,
        hours=hours,
        device_hours=hours * devices,
        price=hours * devices * hardware.gpu_hour_price,
    )


def training_flops_per_token(architecture: Architecture, parameters: Parameters, sequence_length: int) -> int:
    """FLOPs of the forward and backward pass for one token: 6 N + 12 L H Q T (PaLM, arXiv 2204.02311, appendix B).

    N counts the parameters that multiply a token: routed experts only, the output head, and not the embedding lookup. L layers
    of H heads of Q dimensions attend over T tokens; as in the paper, causal masks and document boundaries are not subtracted.
    Recomputation by activation checkpointing is not counted, so that MFU stays comparable with and without it.
    """
    return _flops(architecture, parameters, parameters.multiplied(architecture), sequence_length)


def active_flops_per_token(architecture: Architecture, parameters: Parameters, sequence_length: int) -> int:
    """The same with the parameters that a token needs: without products with sub-dimensions that are not active."""
    return _flops(architecture, parameters, parameters.active(architecture), sequence_length)


def _flops(architecture: Architecture, parameters: Parameters, used: int, sequence_length: int) -> int:
    looked_up = 0 if architecture.tie_word_embeddings else parameters.embeddings
    attention = architecture.num_hidden_layers * architecture.query_size * sequence_length
    return 6 * (used - looked_up) + 12 * attention


def step_seconds(recipe: Recipe, architecture: Architecture, parameters: Parameters, hardware: Hardware) -> float:
    """Seconds of one step if compute, communication and offloading never overlap.

    Compute follows from `training_flops_per_token`; gradient checkpointing adds a third, a teacher's forward pass another
    third. Stage 1 reduces gradients once a step, stage 2 after every micro-batch, and stage 3 also gathers weights twice per
    micro-batch (arXiv 1910.02054, section 7).
    """
    training, engine = recipe.training, recipe.engine
    processes, passes = recipe.launch.total_processes, recipe.accumulation_steps
    micro_batch_tokens = training.micro_batch_size * training.sequence_length
    flops = passes * (micro_batch_tokens + PASS_OVERHEAD_TOKENS)
    flops *= training_flops_per_token(architecture, parameters, training.sequence_length)
    forwards = int(training.gradient_checkpointing) + int(recipe.distillation.is_on)
    computing = flops * (1 + forwards / 3)
    seconds = computing / (hardware.peak_flops * hardware.mfu)

    sent = {0: 2.0, 1: 2.0, 2: passes + 1.0, 3: 3.0 * passes}[engine.zero_stage]
    if engine.zero_stage == 1 and engine.offload_optimizer_to_cpu:
        sent = passes + 1.0
    own_share = (processes - 1) / processes
    volume = sent * own_share * value_bytes(recipe) * parameters.total
    seconds += volume / hardware.link_bytes_per_second

    own = parameters.total / processes
    moved = 0.0
    if engine.offload_optimizer_to_cpu:
        # Gradients after every pass; master weights, moments and gradients once through the host's own memory; weights back.
        moved += own * (passes * FP32_BYTES + 7 * FP32_BYTES + value_bytes(recipe))
    if engine.offload_parameters_to_cpu:
        moved += own * passes * 2 * value_bytes(recipe)
    return seconds + moved / hardware.host_link_bytes_per_second
