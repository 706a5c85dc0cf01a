"""Checks whether a recipe fits its devices, and finds the cheapest settings that do."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.plan.cost import step_seconds
from sparsify.plan.hardware import Hardware
from sparsify.plan.memory import memory
from sparsify.plan.parameters import Architecture, Parameters
from sparsify.recipe.recipe import Recipe


class EngineChoice(BaseModel):
    """Settings of how a step is computed, with their memory and time.

    Attributes:
        zero_stage: This and the next four: settings under the recipe's names.
        device_bytes: Memory of each process, with the allowance.
        host_bytes: Host memory of one node for offloading.
        step_seconds: Assumed time of a step, by which the cheapest is chosen.
    """

    model_config = ConfigDict(frozen=True)

    zero_stage: int
    offload_optimizer_to_cpu: bool
    offload_parameters_to_cpu: bool
    micro_batch_size: int
    gradient_checkpointing: bool
    device_bytes: int
    host_bytes: int
    step_seconds: float

    @computed_field
    @property
    def overrides(self) -> list[str]:
        engine = ("zero_stage", "offload_optimizer_to_cpu", "offload_parameters_to_cpu")
        training = ("micro_batch_size", "gradient_checkpointing")
        return [
            f"{section}.{key}={str(getattr(self, key)).lower()}"
            for section, keys in (("engine", engine), ("training", training))
            for key in keys
        ]


class Verdict(BaseModel):
    """Whether a recipe fits.

    Attributes:
        reason: Memory needed and memory available.
        nearest: The cheapest settings that fit if these do not; None if none do.
        chosen: Whether `engine=auto` chose the settings.
    """

    model_config = ConfigDict(frozen=True)

    fits: bool
    reason: str
    nearest: EngineChoice | None = None
    chosen: bool = False


def verdict_of(
    recipe: Recipe,
    architecture: Architecture,
    parameters: Parameters,
    hardware: Hardware,
    choice: EngineChoice | None = None,
) -> Verdict:
    device_bytes, host_bytes = needs(recipe, architecture, parameters, hardware)
    shortage = _shortage(device_bytes, host_bytes, hardware)
    if shortage is None:
        room = hardware.device_bytes - device_bytes
        reason = f"{gb(device_bytes)} of {gb(hardware.device_bytes)}, {gb(room)} to spare"
        return Verdict(fits=True, reason=reason, chosen=choice is not None)
    nearest = cheapest(recipe, architecture, parameters, hardware)
    return Verdict(fits=False, reason=shortage, nearest=nearest)


def needs(recipe: Recipe, architecture: Architecture, parameters: Parameters, hardware: Hardware) -> tuple[int, int]:
    """Bytes of one process with the allowance, and host memory of one node for offloading."""
    plan = memory(
        recipe,
        architecture,
        parameters,
        on_cpu=hardware.is_cpu,
        node_processes=hardware.node_devices,
    )
    device = plan.device.total + hardware.allowance_bytes(plan.device.total)
    return device, plan.host.total


def _shortage(device_bytes: int, host_bytes: int, hardware: Hardware) -> str | None:
    where = "a process" if hardware.is_cpu else "a GPU"
    if device_bytes > hardware.device_bytes:
        return f"{where} would need {gb(device_bytes)}, and has {gb(hardware.device_bytes)}"
    # On a CPU machine, what is offloaded and the processes share one memory.
    taken = device_bytes * hardware.node_devices if hardware.is_cpu else 0
    if host_bytes and host_bytes + taken > hardware.host_bytes:
        return f"a node's memory would need {gb(host_bytes + taken)}, and has {gb(hardware.host_bytes)}"
    return None


def cheapest(
    recipe: Recipe, architecture: Architecture, parameters: Parameters, hardware: Hardware
) -> EngineChoice | None:
    """The settings that fit with the shortest assumed step; of equal ones the lower ZeRO stage.

    Host memory is used only if nothing fits without it. The global batch size stays. The recipe's `engine.auto_…` settings
    say what may change.
    """
    best: tuple[float, EngineChoice] | None = None
    for candidate in _candidates(recipe, hardware):
        if best and candidate.engine.offload_optimizer_to_cpu:
            break
        device_bytes, host_bytes = needs(candidate, architecture, parameters, hardware)
        if _shortage(device_bytes, host_bytes, hardware) is not None:
            continue
        seconds = step_seconds(candidate, architecture, parameters, hardware)
        if best is None or seconds < best[0] * (1 - SAME):
            choice = EngineChoice(
                zero_stage=candidate.engine.zero_stage,
                offload_optimizer_to_cpu=candidate.engine.offload_optimizer_to_cpu,
                offload_parameters_to_cpu=candidate.engine.offload_parameters_to_cpu,
                micro_batch_size=candidate.training.micro_batch_size,
                gradient_checkpointing=candidate.training.gradient_checkpointing,
                device_bytes=device_bytes,
                host_bytes=host_bytes,
                step_seconds=seconds,
            )
            best = seconds, choice
    return best[1] if best else None


SAME = 0.005
"""Relative difference below which two times count as equal; then the simpler settings, which come first, win."""


def _candidates(recipe: Recipe, hardware: Hardware) -> Iterator[Recipe]:
    """Settings to try: the simplest first, those with offload last."""
    engine, training = recipe.engine, recipe.training
    first_stage = 0 if training.precision == "fp32" else 1
    engines = [(stage, False, False) for stage in range(first_stage, 4)]
    if engine.auto_offload and not hardware.is_cpu:
        engines += [(stage, True, False) for stage in (1, 2, 3)] + [(3, True, True)]
    checkpointing = (False, True) if engine.auto_checkpointing else (training.gradient_checkpointing,)
    sequences = training.global_batch_size // recipe.launch.total_processes
    sizes = [size for size in range(1, sequences + 1) if sequences % size == 0]
    if not engine.auto_micro_batch:
        sizes = [training.micro_batch_size]
    for stage, optimizer, weights in engines:
        for recomputes in checkpointing:
            for size in sizes:
                candidate = deepcopy(recipe)
                candidate.engine.zero_stage = stage
                candidate.engine.offload_optimizer_to_cpu = optimizer
                candidate.engine.offload_parameters_to_cpu = weights
                candidate.training.gradient_checkpointing = recomputes
                candidate.training.micro_batch_size = size
                yield candidate


def gb(num_bytes: int) -> str:
    """Bytes in the unit that GPUs are sold in."""
    return f"{num_bytes / 1e9:,.1f} GB"
