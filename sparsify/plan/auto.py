"""`engine=auto`: a recipe that leaves its ZeRO stage to the plan becomes one with concrete numbers."""

from __future__ import annotations

from copy import deepcopy

from sparsify.errors import RecipeError
from sparsify.plan.estimate import architecture_of
from sparsify.plan.fit import Choice, cheapest, gb
from sparsify.plan.hardware import Hardware, this_machine
from sparsify.plan.parameters import count_parameters
from sparsify.recipe.engine import AUTO_STAGE
from sparsify.recipe.recipe import Recipe


def resolve_engine(
    recipe: Recipe, *, hardware: Hardware | None = None
) -> tuple[Recipe, Choice | None]:
    """Gives a recipe its concrete engine settings.

    Args:
        recipe: A composed recipe.
        hardware: What it is to run on; this machine unless given.

    Returns:
        The recipe itself and None if it does not say `engine=auto`; else a copy with the cheapest settings that fit,
        and what they are.

    Raises:
        RecipeError: If nothing fits.
    """
    if recipe.engine.zero_stage != AUTO_STAGE:
        return recipe, None
    hardware = hardware or this_machine(recipe.launch.processes, recipe.launch.nodes)
    architecture = architecture_of(recipe)
    choice = cheapest(recipe, architecture, count_parameters(architecture), hardware)
    if choice is None:
        raise RecipeError(
            f"engine=auto finds nothing that fits {hardware.name}: {gb(hardware.device_bytes)} for each of "
            f"{recipe.launch.total_processes} process(es), {gb(hardware.host_bytes)} of host memory for each node.",
            allowed="More or larger devices, shorter sequences, or a smaller model.",
            next_step=f"`sparsify plan {recipe.name} engine=zero3 --hardware COUNTxGPU` shows what is missing.",
        )
    return with_choice(recipe, choice), choice


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """A copy of a recipe with the settings of a choice, and nothing left to choose."""
    resolved = deepcopy(recipe)
    resolved.engine.zero_stage = choice.zero_stage
    resolved.engine.offload_optimizer_to_cpu = choice.offload_optimizer_to_cpu
    resolved.engine.offload_parameters_to_cpu = choice.offload_parameters_to_cpu
    resolved.training.micro_batch_size = choice.micro_batch_size
    resolved.training.gradient_checkpointing = choice.gradient_checkpointing
    engine = resolved.engine
    engine.auto_micro_batch = engine.auto_checkpointing = engine.auto_offload = True
    return resolved


def auto_sentence(choice: Choice, hardware: Hardware) -> str:
    """What was chosen and why, in one line."""
    offload = ""
    if choice.offload_optimizer_to_cpu:
        offload = ", optimiser in host memory"
    if choice.offload_parameters_to_cpu:
        offload = ", optimiser and weights in host memory"
    recomputing = "with" if choice.gradient_checkpointing else "without"
    return (
        f"engine=auto: ZeRO-{choice.zero_stage}{offload}, {choice.micro_batch_size} sequence(s) a forward pass, "
        f"{recomputing} gradient checkpointing. Of what fits it has the shortest assumed step; it needs "
        f"{gb(choice.device_bytes)} of {gb(hardware.device_bytes)} on {hardware.name}."
    )
