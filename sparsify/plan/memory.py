"""Bytes that training takes, by part, for a ZeRO stage and a number of processes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe import Recipe

FP32_BYTES = 4
MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: ZeRO-3 lets go of gathered weights beyond it."""


class _Bytes(BaseModel):
    model_config = ConfigDict(frozen=True)

    @computed_field
    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(getattr(self, name) for name in type(self).model_fields)


class HostMemory(_Bytes):
    """What ZeRO-Offload (arXiv 2101.06840) keeps in host memory."""

    weights_bytes: int = 0
    gradients_bytes: int = 0
    master_weights_bytes: int = 0
    adam_moments_bytes: int = 0


class DeviceMemory(HostMemory):
    """What each process holds. Not counted: the framework itself, fragmentation, gradients of activations."""

    gathered_weights_bytes: int = 0
    """ZeRO-3 only: weights that are whole while their layer works."""
    reduction_buffer_bytes: int = 0
    activations_bytes: int = 0
    logits_bytes: int = 0


def memory(
    recipe: Recipe, architecture: Architecture, parameters: Parameters
) -> tuple[DeviceMemory, HostMemory]:
    """Estimates memory in bytes per process, and in host memory for all processes together.

    ZeRO (arXiv 1910.02054, section 3.1) counts 2 + 2 + 12 bytes a parameter in mixed precision: weights, gradients,
    and master weights with Adam's two moments. Here it is 2 + 4 + 12, because the engine accumulates gradients in fp32.
    Stage 1 divides the 12 by the processes, stage 2 gradients too, stage 3 weights too (section 5).
    """
    engine = recipe.engine
    states = _state_bytes(recipe, parameters.total)
    host_parts = set()
    if engine.offload_optimizer_to_cpu:
        host_parts |= {"gradients_bytes", "master_weights_bytes", "adam_moments_bytes"}
    if engine.offload_parameters_to_cpu:
        host_parts |= {"weights_bytes"}
    host = {name: states[name] * recipe.launch.processes for name in host_parts}
    device = {name: size for name, size in states.items() if name not in host_parts}
    working = _working_bytes(recipe, architecture, parameters)
    return DeviceMemory(**device, **working), HostMemory(**host)


def checkpoint_bytes(recipe: Recipe, num_parameters: int) -> int:
    """Bytes of one checkpoint: master weights and moments, and below stage 3 the model's weights beside them."""
    weight_bytes = _weight_bytes(recipe) if recipe.engine.zero_stage < 3 else 0
    master_bytes = FP32_BYTES if recipe.engine.zero_stage else 0
    return num_parameters * (weight_bytes + master_bytes + 2 * FP32_BYTES)


def layer_activation_bytes(
    architecture: Architecture, ffn_activation: str, weight_bytes: int
) -> int:
    """Bytes that one layer keeps for its backward pass, for each token.

    The counting is Korthikanti et al.'s (arXiv 2205.05198, section 4.1) for this block: without dropout, and without
    attention scores, which fused attention computes again. Counted are each norm's input and normalised value and
    its output; queries, keys, values, their answer and the log-sum-exp of each head; and of the feed-forward block
    the factors and their product. silu keeps its input as well, relu does not. Fused experts hold gate and up in one
    tensor, so that a factor without relu keeps both.
    """
    a = architecture
    norms = 2 * a.hidden_size * (FP32_BYTES + 2 * weight_bytes)
    attention = (
        2 * weight_bytes * (a.query_size + a.key_value_size) + FP32_BYTES * a.num_attention_heads
    )
    lean = ("drelu",) if a.num_local_experts else ("drelu", "reglu")
    neuron_values = 3 if ffn_activation in lean else 4
    ffn = weight_bytes * neuron_values * a.intermediate_size
    if a.num_local_experts:
        routed_copies = 2 * weight_bytes * a.hidden_size
        ffn = a.num_experts_per_tok * (ffn + routed_copies)
    return norms + attention + ffn


def _state_bytes(recipe: Recipe, num_parameters: int) -> dict[str, int]:
    """Bytes per process of weights, gradients and optimiser."""
    stage, processes = recipe.engine.zero_stage, recipe.launch.total_processes

    def held(bytes_each: int, split_from_stage: int) -> int:
        return num_parameters * bytes_each // (processes if stage >= split_from_stage else 1)

    return {
        "weights_bytes": held(_weight_bytes(recipe), 3),
        "gradients_bytes": held(FP32_BYTES, 2),
        "master_weights_bytes": held(FP32_BYTES, 1) if stage else 0,
        "adam_moments_bytes": held(2 * FP32_BYTES, 1),
    }


def _working_bytes(
    recipe: Recipe, architecture: Architecture, parameters: Parameters
) -> dict[str, int]:
    """Bytes per process that come and go with each step."""
    a, engine, weight_bytes = architecture, recipe.engine, _weight_bytes(recipe)
    tokens = recipe.training.micro_batch_windows * recipe.training.window_tokens
    layer = layer_activation_bytes(a, recipe.activation.ffn_activation, weight_bytes)
    whole_layers = 1 if recipe.training.gradient_checkpointing else a.num_hidden_layers
    inputs = a.num_hidden_layers * weight_bytes * a.hidden_size
    kept_inputs = inputs if recipe.training.gradient_checkpointing else 0
    working = {
        "activations_bytes": tokens * (whole_layers * layer + kept_inputs),
        # Logits, their fp32 copy, its log-softmax and their gradients: 12 bytes at the fullest in either precision.
        "logits_bytes": tokens * a.vocab_size * 3 * FP32_BYTES,
    }
    if engine.zero_stage >= 2:
        largest = max(engine.reduce_bucket_elements, _largest_tensor(a))
        working["reduction_buffer_bytes"] = largest * weight_bytes
    if engine.zero_stage == 3:
        experts = parameters.gate + parameters.up + parameters.down
        live = max(MAX_LIVE_PARAMETERS, experts // a.num_hidden_layers)
        working["gathered_weights_bytes"] = min(parameters.total, live) * weight_bytes
    return working


def _largest_tensor(a: Architecture) -> int:
    fused_experts = 2 * a.num_local_experts * a.intermediate_size
    return a.hidden_size * max(a.vocab_size, a.intermediate_size, fused_experts)


def _weight_bytes(recipe: Recipe) -> int:
    return 2 if recipe.training.precision == "bf16" else FP32_BYTES
