"""Memory of training by part, for a ZeRO stage and a number of processes.

What DeepSpeed allocates, and when, follows its engine and its optimisers (`bf16_optimizer`, `stage_1_and_2`,
`stage3`); `scripts/validate_memory_plan.py` compares it with measured peaks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.plan.activation_memory import FP32_BYTES, Pass, forward_and_backward, value_bytes
from sparsify.plan.extras import TeacherBytes, teacher_bytes
from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe.recipe import Recipe

MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of stage3_max_live_parameters: ZeRO-3 releases gathered weights beyond it."""
ALLREDUCE_PARAMETERS = 500_000_000
"""Elements of one all-reduce by DeepSpeed's engine, which is used without a ZeRO optimiser."""
PREFETCH_PARAMETERS = 50_000_000
"""DeepSpeed's default of stage3_prefetch_bucket_size."""
SUB_GROUP_PARAMETERS = 1_000_000_000
"""DeepSpeed's default of sub_group_size: parameters that ZeRO-3 updates at a time."""
CPU_STEP_COPIES, GPU_STEP_COPIES = 2, 1
"""Temporary copies in one AdamW call: square root and quotient of the second moment on a CPU; on a GPU the quotient is
computed in place."""


class _Bytes(BaseModel):
    model_config = ConfigDict(frozen=True)

    @computed_field
    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        fields = type(self).model_fields
        return {name: getattr(self, name) for name in fields if name.endswith("_bytes")}


class HostMemory(_Bytes):
    """Host memory of ZeRO-Offload (arXiv 2101.06840) and of a suite under ZeRO-3."""

    weights_bytes: int = 0
    gradients_bytes: int = 0
    master_weights_bytes: int = 0
    adam_moments_bytes: int = 0
    suite_weights_bytes: int = 0
    """The copy of the model that runs `eval.suite` under ZeRO-3; on the first GPU instead if it fits there."""


class DeviceMemory(HostMemory):
    """Memory of each process's tensors at the peak of a step."""

    moment: str
    """Moment of the peak: `loss`, `backward` or `optimizer step`."""
    gathered_weights_bytes: int = 0
    """ZeRO-3 only: weights that are gathered while their layer runs."""
    communication_buffers_bytes: int = 0
    activations_bytes: int = 0
    logits_bytes: int = 0
    optimizer_step_bytes: int = 0
    """Temporary copies that AdamW makes."""
    mask_bytes: int = 0
    """Thresholds of the source's mask."""
    teacher_weights_bytes: int = 0
    """Distillation only: the dense source."""
    teacher_outputs_bytes: int = 0
    """Distillation only: the teacher's logits and outputs of blocks and layers for a micro-batch."""


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a recipe, bytes.

    Attributes:
        device: Tensors of each process at the peak of a step.
        with_checkpointing_bytes: Activations at that moment if `training.gradient_checkpointing` is set.
        without_checkpointing_bytes: Activations at that moment if it is not.
    """

    device: DeviceMemory
    host: HostMemory
    with_checkpointing_bytes: int
    without_checkpointing_bytes: int


def memory(
    recipe: Recipe,
    architecture: Architecture,
    parameters: Parameters,
    *,
    on_cpu: bool = False,
    node_processes: int | None = None,
) -> MemoryPlan:
    """Estimates the device memory of one process, and the host memory of one node.

    ZeRO (arXiv 1910.02054, section 3.1) counts 2 + 2 + 12 bytes a parameter in mixed precision: weights, gradients,
    and master weights with Adam's two moments. Here it is 2 + 4 + 12, because the engine accumulates gradients in fp32.
    Stage 1 divides the 12 by the processes, stage 2 gradients too, stage 3 weights too (section 5).

    On a CPU, PyTorch's AdamW makes more copies.
    """
    passes = [forward_and_backward(recipe, architecture, checkpointing=on) for on in (True, False)]
    checkpointing = recipe.training.gradient_checkpointing
    states = _Sizes(recipe, architecture, parameters, on_cpu)
    teacher = teacher_bytes(recipe, architecture, parameters)
    moments = list(_moments(states, passes[0] if checkpointing else passes[1], teacher))
    fullest = max(range(len(moments)), key=lambda index: moments[index].total)
    activations = [one.of_moment[fullest] for one in passes]
    host = states.host(node_processes or recipe.launch.processes)
    return MemoryPlan(moments[fullest], host, *activations)


def checkpoint_bytes(recipe: Recipe, num_parameters: int) -> int:
    """Bytes of one checkpoint: master weights and moments, and below stage 3 also the model's weights."""
    weight_bytes = value_bytes(recipe) if recipe.engine.zero_stage < 3 else 0
    master_bytes = FP32_BYTES if recipe.engine.zero_stage else 0
    return num_parameters * (weight_bytes + master_bytes + 2 * FP32_BYTES)


class _Sizes:
    """Bytes per process that do not depend on the batch."""

    def __init__(self, recipe: Recipe, architecture: Architecture, parameters: Parameters, on_cpu: bool) -> None:
        self.engine, self.stage = recipe.engine, recipe.engine.zero_stage
        self.processes = recipe.launch.total_processes
        self.value_bytes, self.on_cpu = value_bytes(recipe), on_cpu
        self.runs_suite_on_copy = recipe.eval.suite is not None and self.stage == 3
        self.accumulates = recipe.accumulation_steps > 1
        self.all = parameters.total
        self.own = -(-parameters.total // self.processes)
        self.largest = largest_tensor(architecture)
        experts = parameters.gate + parameters.up + parameters.down + parameters.group_routers
        self.layer = experts // architecture.num_hidden_layers
        self.mask_values = architecture.mask_values

    @property
    def is_bf16_optimizer(self) -> bool:
        """Whether DeepSpeed uses its BF16_Optimizer: for stage 1 without offload."""
        return self.stage == 1 and self.value_bytes == 2 and not self.engine.offload_optimizer_to_cpu

    def kept(self) -> dict[str, int]:
        held = self.own if self.stage else self.all
        parts = {"adam_moments_bytes": 2 * FP32_BYTES * held}
        parts["master_weights_bytes"] = FP32_BYTES * held if self.stage else 0
        if self.engine.offload_optimizer_to_cpu:
            parts = {}
        if not self.engine.offload_parameters_to_cpu:
            parts["weights_bytes"] = self.value_bytes * (self.own if self.stage == 3 else self.all)
        return parts | {"mask_bytes": self.value_bytes * self.mask_values}

    def gradients(self, *, begun: bool) -> int:
        """Accumulated gradients; `begun` after a backward pass of this step."""
        if self.engine.offload_optimizer_to_cpu:
            return 0
        if self.is_bf16_optimizer:
            return (FP32_BYTES + self.value_bytes) * self.all  # of the whole batch, and of a micro-batch
        if self.stage == 3:
            return FP32_BYTES * self.own
        held = self.own if self.stage == 2 else self.all
        return FP32_BYTES * held if begun else 0

    def step_gradients(self) -> int:
        """Gradients when the optimiser starts: stage 1 has released those of other processes by then."""
        if self.stage == 1 and not self.is_bf16_optimizer:
            return 0 if self.engine.offload_optimizer_to_cpu else FP32_BYTES * self.own
        return self.gradients(begun=True)

    def buffers(self, *, at_end: bool) -> int:
        """Buckets in which gradients are reduced; at the end of the backward pass also the copy that is sent."""
        bucket = self.engine.reduce_bucket_elements
        if self.is_bf16_optimizer or self.stage == 0:
            # The engine reduces chunks of its own size; bf16 gradients of the whole batch are fp32 there and sent as bf16.
            chunk = min(self.all, ALLREDUCE_PARAMETERS)
            width = FP32_BYTES + (self.value_bytes if self.is_bf16_optimizer else 0)
            return chunk * width if at_end and self.processes > 1 else 0
        size = bucket * self.value_bytes
        if self.stage == 3 and self.value_bytes == 2:
            size += FP32_BYTES * self.own  # reduced gradients in the dtype in which they are accumulated
        if at_end:
            size += min(max(bucket, self.largest), self.all) * self.value_bytes
            if self.value_bytes == 2:
                size += FP32_BYTES * self.largest  # the same, tensor by tensor
            elif self.stage == 2:
                size += FP32_BYTES * self.own  # gradients of a micro-batch, in addition to the sum
        return size

    def gathered(self) -> int:
        """Weights that ZeRO-3 has gathered; DeepSpeed keeps those that are used again soon."""
        if self.stage < 3:
            return 0
        live = min(self.all, max(MAX_LIVE_PARAMETERS, self.layer))
        if self.processes > 1:  # receive buffers, before the values are copied into each tensor
            live += min(self.all, max(PREFETCH_PARAMETERS, self.layer))
        return live * self.value_bytes

    def step(self) -> dict[str, int]:
        if self.engine.offload_optimizer_to_cpu:
            return {}
        copies = CPU_STEP_COPIES if self.on_cpu else GPU_STEP_COPIES
        updated = min(self.own, SUB_GROUP_PARAMETERS) if self.stage == 3 else self.own
        if self.stage == 0:
            updated = self.largest if self.on_cpu else self.all
        is_flat = self.is_bf16_optimizer or (self.stage == 2 and self.value_bytes == 2)
        flat = 0 if self.stage == 0 or is_flat else updated  # otherwise gradients are flattened first
        return {"optimizer_step_bytes": FP32_BYTES * (copies * updated + flat)}

    def host(self, node_processes: int) -> HostMemory:
        """Offloaded tensors of one node's processes, and the copy that a suite loads."""
        parts: dict[str, int] = {}
        if self.engine.offload_optimizer_to_cpu:
            for name, size in (("gradients", 1), ("master_weights", 1), ("adam_moments", 2)):
                parts[f"{name}_bytes"] = size * FP32_BYTES * self.own * node_processes
        if self.engine.offload_parameters_to_cpu:
            parts["weights_bytes"] = self.value_bytes * self.own * node_processes
        if self.runs_suite_on_copy:
            parts["suite_weights_bytes"] = self.value_bytes * self.all
        return HostMemory(**parts)


def _moments(sizes: _Sizes, micro_batch: Pass, teacher: TeacherBytes) -> Iterator[DeviceMemory]:
    """Moments at which memory may peak, in the order of `Pass.of_moment`."""
    kept, begun = sizes.kept(), sizes.accumulates
    kept["teacher_weights_bytes"] = teacher.weights
    yield DeviceMemory(
        moment="loss",
        **kept,
        gradients_bytes=sizes.gradients(begun=begun),
        communication_buffers_bytes=sizes.buffers(at_end=False),
        gathered_weights_bytes=sizes.gathered(),
        activations_bytes=micro_batch.of_moment[0],
        logits_bytes=micro_batch.loss_logits_bytes,
        teacher_outputs_bytes=teacher.logits + teacher.layer_outputs,
    )
    for place, whole in ((1, begun), (2, True)):
        yield DeviceMemory(
            moment="backward",
            **kept,
            gradients_bytes=sizes.gradients(begun=whole),
            communication_buffers_bytes=sizes.buffers(at_end=whole),
            gathered_weights_bytes=sizes.gathered(),
            activations_bytes=micro_batch.of_moment[place],
            logits_bytes=micro_batch.kept_logits_bytes,
            teacher_outputs_bytes=teacher.layer_outputs,
        )
    bucket = sizes.engine.reduce_bucket_elements * sizes.value_bytes
    buffers = bucket if sizes.stage == 3 else 0  # only ZeRO-3 keeps it
    yield DeviceMemory(
        moment="optimizer step",
        **kept,
        **sizes.step(),
        gradients_bytes=sizes.step_gradients(),
        communication_buffers_bytes=buffers,
        activations_bytes=micro_batch.of_moment[3],
        teacher_outputs_bytes=teacher.layer_outputs,
    )


def largest_tensor(a: Architecture) -> int:
    fused_experts = 2 * a.num_local_experts * a.intermediate_size
    return a.hidden_size * max(a.vocab_size, a.intermediate_size, fused_experts)
