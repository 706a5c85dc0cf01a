"""Estimates a recipe's memory, time, price, steps and tokens, and resolves `engine=auto`.

Computed from the recipe and the model's configuration: no weights, no GPU, no network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.conversion.architecture import held_fields, refuse_integers, sparse_config, text_part
from sparsify.conversion.source_checkpoint import PACKAGE_PREFIX, locate
from sparsify.conversion.weight_zeros import weight_sparsity
from sparsify.errors import ModelError, RecipeError
from sparsify.metadata import read_json, user_path
from sparsify.methods.base import stored_by, upcycling_of
from sparsify.mixture.sequences.shares import Shares, share_phases
from sparsify.models.masking import GROUP, mask_tensors
from sparsify.plan.activation_memory import value_bytes
from sparsify.plan.cost import Cost, active_flops_per_token, cost, training_flops_per_token
from sparsify.plan.extras import CalibrationPlan, RefitPlan, num_zero_weights, plan_calibration, plan_refits
from sparsify.plan.fit import EngineChoice, Verdict, cheapest, gb, verdict_of
from sparsify.plan.hardware import Hardware, this_machine
from sparsify.plan.memory import DeviceMemory, HostMemory, checkpoint_bytes, memory
from sparsify.plan.parameters import Architecture, Parameters, count_parameters
from sparsify.recipe.engine import AUTO_STAGE
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import Recipe


class SourcePlan(BaseModel):
    """What a run reads of one source.

    Attributes:
        tokens: Tokens of the whole run; a source with a limit may give less.
        epochs: Epochs over the source; None if it is not tokenised to its end yet.
        max_epochs: Limit on the epochs; None without one.
        when_exhausted: What happens at the limit.
    """

    model_config = ConfigDict(frozen=True)

    group: str
    tokens: int
    epochs: float | None
    max_epochs: float | None
    when_exhausted: str


class PhasePlan(BaseModel):
    """A part of the run over which the shares of tokens are constant or change linearly."""

    model_config = ConfigDict(frozen=True)

    until_tokens: int
    first: dict[str, float]
    last: dict[str, float]


class Plan(BaseModel):
    """An estimate; `plan_table` formats it, `model_dump()` is its JSON.

    Attributes:
        active_parameters: Parameters used for one token; fewer than all in a mixture of experts or of hidden dimensions.
        flops_per_token: Floating-point operations of training for one token, forward and backward, as they are computed.
        active_flops_per_token: The same without products with zeros of sub-dimensions that are not active.
        device: Bytes of each process's tensors at the fullest moment of a step, on its GPU (on a CPU machine: in its memory).
        host: Bytes in one node's memory for what ZeRO-Offload moves there, all its processes together.
        activations_with_checkpointing_bytes: Activations at that moment with `training.gradient_checkpointing`.
        activations_without_checkpointing_bytes: Activations at that moment without it.
        allowance_bytes: Added to `device` for the framework and fragmentation, an assumption.
        zero_weights: Weights of the projections that are zero while the model trains.
        calibration: Memory and disk of the calibrated replacement; None without one.
        refits: Memory of refits at milestones of a blending schedule; None without any.
        cost: Time and price, from a throughput that was given or from `hardware`.
        checkpoint_bytes: One checkpoint. The disk holds `checkpoint.keep_last` of them, one being written,
            and those that `checkpoint.keep_every_tokens` keeps permanently.
        kept_for_good: Number of permanent checkpoints at the end of the run, without those among the last.
        num_tokens: `training.budget_tokens` rounded down to whole steps.
        sources: The sources that have a share of `num_tokens`.
        phases: Their shares over the run; one phase unless the mixture has more.
    """

    model_config = ConfigDict(frozen=True)

    recipe: str
    ffn_activation: str
    precision: str
    zero_stage: int
    processes: int
    parameters: Parameters
    active_parameters: int
    flops_per_token: int
    active_flops_per_token: int
    micro_batch_size: int
    gradient_checkpointing: bool
    hardware: Hardware
    device: DeviceMemory
    host: HostMemory
    activations_with_checkpointing_bytes: int
    activations_without_checkpointing_bytes: int
    allowance_bytes: int
    verdict: Verdict
    zero_weights: int
    calibration: CalibrationPlan | None
    refits: RefitPlan | None
    cost: Cost
    checkpoint_bytes: int
    keep_checkpoints: int
    kept_for_good: int
    num_steps: int
    step_tokens: int
    accumulation_steps: int
    num_sequences: int
    sequence_length: int
    num_tokens: int
    warmup_steps: int
    peak_learning_rate: float
    final_learning_rate: float
    sources: dict[str, SourcePlan]
    phases: list[PhasePlan]
    cache_dir: str

    @computed_field
    @property
    def disk_bytes(self) -> int:
        """Checkpoints at their fullest: those kept and the one being written."""
        return self.checkpoint_bytes * (self.kept_for_good + self.keep_checkpoints + 1)


def make_plan(
    recipe: Recipe,
    *,
    hardware: Hardware | None = None,
    tokens_per_second: float | None = None,
    source_tokens: Mapping[str, int] | None = None,
    choice: EngineChoice | None = None,
) -> Plan:
    """Estimates a recipe's memory, time and price, and computes its steps and tokens.

    Raises:
        RecipeError: If the model's architecture is not known.
    """
    architecture = architecture_of(recipe)
    parameters = count_parameters(architecture)
    hardware = hardware or this_machine(recipe.launch.processes, recipe.launch.nodes)
    verdict = verdict_of(recipe, architecture, parameters, hardware, choice)
    needed = memory(
        recipe,
        architecture,
        parameters,
        on_cpu=hardware.is_cpu,
        node_processes=hardware.node_devices,
    )
    num_sequences = recipe.num_steps * recipe.training.global_batch_size
    sources = _sources(recipe.mixture, num_sequences, recipe.training.sequence_length, source_tokens or {})
    return Plan(
        recipe=recipe.name,
        ffn_activation=recipe.activation.ffn_activation,
        precision=recipe.training.precision,
        zero_stage=recipe.engine.zero_stage,
        processes=recipe.launch.total_processes,
        parameters=parameters,
        active_parameters=parameters.active(architecture),
        flops_per_token=training_flops_per_token(architecture, parameters, recipe.training.sequence_length),
        active_flops_per_token=active_flops_per_token(architecture, parameters, recipe.training.sequence_length),
        micro_batch_size=recipe.training.micro_batch_size,
        gradient_checkpointing=recipe.training.gradient_checkpointing,
        hardware=hardware,
        device=needed.device,
        host=needed.host,
        activations_with_checkpointing_bytes=needed.with_checkpointing_bytes,
        activations_without_checkpointing_bytes=needed.without_checkpointing_bytes,
        allowance_bytes=hardware.allowance_bytes(needed.device.total),
        verdict=verdict,
        zero_weights=num_zero_weights(recipe, architecture),
        calibration=plan_calibration(recipe, architecture, value_bytes(recipe) * parameters.total),
        refits=plan_refits(recipe, architecture),
        cost=cost(recipe, architecture, parameters, hardware, tokens_per_second),
        checkpoint_bytes=checkpoint_bytes(recipe, parameters.total) + value_bytes(recipe) * architecture.mask_values,
        keep_checkpoints=recipe.checkpoint.keep_last,
        kept_for_good=_kept_for_good(recipe),
        num_steps=recipe.num_steps,
        step_tokens=recipe.step_tokens,
        accumulation_steps=recipe.accumulation_steps,
        num_sequences=num_sequences,
        sequence_length=recipe.training.sequence_length,
        num_tokens=recipe.num_steps * recipe.step_tokens,
        warmup_steps=math.ceil(recipe.optimizer.warmup_tokens / recipe.step_tokens),
        peak_learning_rate=recipe.optimizer.peak_learning_rate,
        final_learning_rate=recipe.optimizer.final_learning_rate,
        sources=sources,
        phases=_phases(recipe, num_sequences, sources),
        cache_dir=recipe.cache_dir,
    )


def _phases(recipe: Recipe, num_sequences: int, sources: Collection[str]) -> list[PhasePlan]:
    return [
        PhasePlan(
            until_tokens=round(end * num_sequences) * recipe.training.sequence_length,
            first={name: first[name] for name in sources},
            last={name: last[name] for name in sources},
        )
        for end, first, last in share_phases(recipe.mixture)
    ]


def _kept_for_good(recipe: Recipe) -> int:
    settings = recipe.checkpoint
    if settings.keep_every_tokens is None:
        return 0
    older_tokens = recipe.num_steps * recipe.step_tokens - settings.keep_last * settings.every_tokens
    return max(0, older_tokens) // settings.keep_every_tokens


def _sources(
    mixture: MixtureSection, num_sequences: int, sequence_length: int, known: Mapping[str, int]
) -> dict[str, SourcePlan]:
    planned = Shares.of(mixture, num_sequences).planned(num_sequences)
    return {
        name: SourcePlan(
            group=source.group,
            tokens=planned[name] * sequence_length,
            epochs=planned[name] * sequence_length / known[name] if known.get(name) else None,
            max_epochs=source.max_epochs,
            when_exhausted=source.when_exhausted,
        )
        for name, source in mixture.sources.items()
        if name in planned
    }


def architecture_of(recipe: Recipe) -> Architecture:
    """Sizes of a recipe's model: from `model.source`'s config.json if it is on this machine, else `model.architecture`.

    Raises:
        RecipeError: If it is not known, or its context is shorter than a training sequence.
        ModelError: If it cannot be held, or is quantised.
    """
    model = recipe.model
    fields = local_config(model) or model.architecture
    if not fields:
        raise RecipeError(
            f"Nothing here says how large {model.source} is.",
            allowed="A local checkpoint folder, or the fields of its config.json under model.architecture.",
            next_step="Download the checkpoint and set model.source to its folder, or set model.architecture.",
        )
    where = model.source or "model.architecture"
    refuse_integers(fields, where)
    fields = held_fields(fields, where)
    if (context := fields.get("max_position_embeddings")) is not None:
        check_context(recipe, context)
    mask_values = 0
    if recipe.conversion.drop_source_mask:
        fields = fields | {"sparsification": None}
    if fields.get("sparsification"):
        config = sparse_config(fields, recipe.activation.ffn_activation, where)
        mask_values = config.num_hidden_layers * sum(
            math.prod(shape)
            for site, parts in mask_tensors(config).items()
            for part, (_, shape) in parts.items()
            if site != GROUP or part not in ("router", "bias")
        )
    elif recipe.conversion.makes_mask:
        fields = fields | {"sparsification": stored_by(recipe.conversion)}
    upcycling = upcycling_of(recipe.conversion)
    if upcycling is not None:
        fields = upcycling.held_as(sparse_config(fields, recipe.activation.ffn_activation, where)).to_dict()
    stored = weight_sparsity(fields)
    sizes = fields | {"mask_values": mask_values, "zero_share": stored.sparsity if stored else 0.0}
    return Architecture.of(sizes, model.upcycle_experts, model.upcycle_experts_per_token)


def check_context(recipe: Recipe, context: int) -> None:
    """Raises RecipeError if a training sequence is longer than the model's context."""
    if recipe.training.sequence_length > context:
        raise RecipeError(
            f"training.sequence_length is {recipe.training.sequence_length}, longer than the model's context.",
            allowed=f"At most {context} tokens for this model.",
            next_step=f"Set training.sequence_length={context} or less.",
        )


def is_local(source: str) -> bool:
    """Whether a model's `source` can be read without a network."""
    return source.startswith(PACKAGE_PREFIX) or user_path(source).exists()


def local_config(model: ModelSection) -> dict[str, Any]:
    """Content of the config.json that `source` has on this machine; empty when there is none."""
    if not model.source or not is_local(model.source):
        return {}
    try:
        path = locate(model.source) / "config.json"
    except ModelError:
        return {}  # a package that is not installed yet
    return text_part(read_json(path, ModelError)) if path.is_file() else {}


def resolve_engine(recipe: Recipe, *, hardware: Hardware | None = None) -> tuple[Recipe, EngineChoice | None]:
    """Replaces `engine=auto` by concrete engine settings.

    Args:
        recipe: A composed recipe.
        hardware: Hardware of the run; default: this machine.

    Returns:
        The recipe itself and None without `engine=auto`; otherwise a copy with the cheapest settings that fit, and these
        settings.

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


def with_choice(recipe: Recipe, choice: EngineChoice) -> Recipe:
    resolved = deepcopy(recipe)
    resolved.engine.zero_stage = choice.zero_stage
    resolved.engine.offload_optimizer_to_cpu = choice.offload_optimizer_to_cpu
    resolved.engine.offload_parameters_to_cpu = choice.offload_parameters_to_cpu
    resolved.training.micro_batch_size = choice.micro_batch_size
    resolved.training.gradient_checkpointing = choice.gradient_checkpointing
    engine = resolved.engine
    engine.auto_micro_batch = engine.auto_checkpointing = engine.auto_offload = True
    return resolved


def auto_sentence(choice: EngineChoice, hardware: Hardware) -> str:
    """The chosen settings and the reason, in one line."""
    offload = ""
    if choice.offload_optimizer_to_cpu:
        offload = ", optimiser in host memory"
    if choice.offload_parameters_to_cpu:
        offload = ", optimiser and weights in host memory"
    recomputing = "with" if choice.gradient_checkpointing else "without"
    return (
        f"engine=auto: ZeRO-{choice.zero_stage}{offload}, {choice.micro_batch_size} sequence(s) a forward pass, "
        f"{recomputing} gradient checkpointing. Of all settings that fit, these have the shortest assumed step. They need "
        f"{gb(choice.device_bytes)} of {gb(hardware.device_bytes)} on {hardware.name}."
    )
