"""A recipe: all sections, quantities derived from them, and checks across sections.

A recipe is one YAML file in `recipes/` (or a user's own) that Hydra composes onto `Recipe` (`sparsify.recipe.compose`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field

from sparsify.errors import RecipeError
from sparsify.models.activations import ACTIVATIONS, activation_names, is_dense
from sparsify.recipe.engine import (
    AUTO_STAGE,
    EngineSection,
    LaunchSection,
    TrackingSection,
    check_auto,
    check_nodes,
)
from sparsify.recipe.evaluation import EvalSection, check_suite
from sparsify.recipe.fields import Section, check_name, checked
from sparsify.recipe.mixture import MixtureSection, check_mixture
from sparsify.recipe.model import ModelSection, check_model
from sparsify.recipe.sparsification import (
    ActivationSection,
    BlendingSection,
    ConversionSection,
    DistillationSection,
    GroupRoutingSection,
    PenaltySection,
    check_activation,
    check_conversion,
    check_group_routing,
)
from sparsify.recipe.training import (
    BaselineSection,
    CheckpointSection,
    OptimizerSection,
    StabilitySection,
    TrainingSection,
)

CACHE_DIR = "~/.cache/sparsify"


@dataclass(kw_only=True)
class Recipe(Section):
    name: str
    run_dir: str = "runs/${name}"
    """Folder of the run. Overrides are added to its name, so that every variant has its own."""
    cache_dir: str = CACHE_DIR
    """Tokenised sources, shared by all runs."""
    model: ModelSection = field(default_factory=ModelSection)
    activation: ActivationSection
    conversion: ConversionSection = field(default_factory=ConversionSection)
    blending: BlendingSection = field(default_factory=BlendingSection)
    penalty: PenaltySection = field(default_factory=PenaltySection)
    group_routing: GroupRoutingSection = field(default_factory=GroupRoutingSection)
    distillation: DistillationSection = field(default_factory=DistillationSection)
    mixture: MixtureSection
    training: TrainingSection
    optimizer: OptimizerSection
    stability: StabilitySection = field(default_factory=StabilitySection)
    checkpoint: CheckpointSection
    eval: EvalSection
    engine: EngineSection
    launch: LaunchSection = field(default_factory=LaunchSection)
    tracking: TrackingSection = field(default_factory=TrackingSection)
    baseline: BaselineSection = field(default_factory=BaselineSection)

    @property
    def is_dense(self) -> bool:
        """Whether the model that is trained makes no exact zeros."""
        return is_dense(self.activation.ffn_activation, is_masked=self.conversion.makes_mask)

    @property
    def step_tokens(self) -> int:
        return self.training.global_batch_size * self.training.sequence_length

    @property
    def num_steps(self) -> int:
        return self.training.budget_tokens // self.step_tokens

    @property
    def accumulation_steps(self) -> int:
        return self.training.global_batch_size // (self.training.micro_batch_size * self.launch.total_processes)


def validate(recipe: Recipe) -> Recipe:
    """Refuses settings that cannot work together.

    Returns:
        The same recipe.

    Raises:
        RecipeError: Naming the setting, its value, what is allowed and what to change.
    """
    checked(Recipe, asdict(recipe))
    for part in recipe.name.split("/"):  # a recipe of a sub-folder is named FOLDER/NAME
        check_name("name", part)
    check_activation(recipe.activation)
    _check_numbers(recipe)
    check_model(recipe.model)
    _check_conversion(recipe)
    _check_batch(recipe)
    _check_engine(recipe)
    check_nodes(recipe.launch)
    check_mixture(recipe.mixture)
    _check_blending(recipe)
    _check_stages(recipe)
    _check_penalty(recipe)
    _check_target(recipe)
    check_group_routing(recipe.group_routing, recipe.num_steps * recipe.step_tokens)
    _check_distillation(recipe)
    _check_fused(recipe)
    _check_compile(recipe)
    _check_liger(recipe)
    check_suite(recipe.eval, recipe.checkpoint.every_tokens)
    return recipe


def _check_numbers(recipe: Recipe) -> None:
    training, optimizer = recipe.training, recipe.optimizer
    if not 0 <= recipe.eval.report_curve_tokens <= recipe.eval.report_tokens:
        raise RecipeError(
            f"eval.report_curve_tokens is {recipe.eval.report_curve_tokens}.",
            allowed=f"Allowed: 0 (no curves) to eval.report_tokens ({recipe.eval.report_tokens}).",
        )
    if not recipe.stability.max_bad_steps < recipe.stability.recent_steps:
        raise RecipeError(
            f"stability.max_bad_steps is {recipe.stability.max_bad_steps}, which would never be reached.",
            allowed=f"It must be below stability.recent_steps ({recipe.stability.recent_steps}).",
        )
    every, keep_every = recipe.checkpoint.every_tokens, recipe.checkpoint.keep_every_tokens
    if keep_every is not None and keep_every % every:
        raise RecipeError(
            f"checkpoint.keep_every_tokens is {keep_every}, where no checkpoint is saved.",
            allowed=f"A multiple of checkpoint.every_tokens ({every}).",
            next_step=f"Set checkpoint.keep_every_tokens={math.ceil(keep_every / every) * every}.",
        )
    if not 0 <= optimizer.final_learning_rate <= optimizer.peak_learning_rate:
        raise RecipeError(
            f"optimizer.final_learning_rate is {optimizer.final_learning_rate}.",
            allowed=f"Allowed: 0 to optimizer.peak_learning_rate ({optimizer.peak_learning_rate}).",
        )
    if not 0 <= optimizer.warmup_tokens < training.budget_tokens:
        raise RecipeError(
            f"optimizer.warmup_tokens is {optimizer.warmup_tokens}.",
            allowed=f"It must be below training.budget_tokens ({training.budget_tokens}).",
        )


def _check_conversion(recipe: Recipe) -> None:
    conversion, least = recipe.conversion, 8 * recipe.training.sequence_length
    if conversion.calibration_tokens == 0:
        settings, defaults = asdict(conversion), asdict(ConversionSection())
        del settings["drop_source_mask"]
        if recipe.blending.refit_milestones:
            check_conversion(conversion)
            del settings["ridge"]
        for key in (key for key in settings if settings[key] != defaults[key]):
            raise RecipeError(
                f"conversion.{key}={settings[key]} would be ignored: nothing is calibrated.",
                next_step="Set conversion.calibration_tokens too, or omit it.",
            )
        return
    check_conversion(conversion)
    if conversion.calibration_tokens < least:
        raise RecipeError(
            f"conversion.calibration_tokens is {conversion.calibration_tokens}.",
            allowed=f"0, or at least eight sequences: {least} tokens.",
        )
    if recipe.model.init == "random":
        raise RecipeError(
            "conversion.calibration_tokens is set with model.init=random.",
            allowed="Calibration reproduces the outputs of a trained model.",
            next_step="Omit it, or give model.source.",
        )


def _check_batch(recipe: Recipe) -> None:
    training, engine = recipe.training, recipe.engine
    replaced = engine.zero_stage == AUTO_STAGE and engine.auto_micro_batch
    micro_batch_size = 1 if replaced else training.micro_batch_size
    processes = recipe.launch.total_processes
    per_forward = processes * micro_batch_size
    if training.global_batch_size % per_forward:
        raise RecipeError(
            f"training.global_batch_size is {training.global_batch_size}, which {processes} process(es) of "
            f"{micro_batch_size} sequence(s) cannot share evenly.",
            allowed="It must be a multiple of launch.nodes x launch.processes x training.micro_batch_size "
            f"({per_forward}).",
            next_step=f"Set training.global_batch_size={max(1, training.global_batch_size // per_forward) * per_forward}, "
            "or a smaller training.micro_batch_size.",
        )
    if recipe.num_steps < 1:
        raise RecipeError(
            f"training.budget_tokens is {training.budget_tokens}, less than one step.",
            allowed=f"One step is global_batch_size x sequence_length = {recipe.step_tokens} tokens.",
        )


def _check_engine(recipe: Recipe) -> None:
    engine = recipe.engine
    check_auto(engine)
    if engine.zero_stage == 0 and recipe.training.precision == "bf16":
        raise RecipeError(
            "engine.zero_stage is 0 with training.precision=bf16.",
            allowed="DeepSpeed keeps fp32 master weights with a correct Adam from stage 1 on.",
            next_step="Use engine=zero1, or training.precision=fp32.",
        )
    if engine.offload_optimizer_to_cpu and engine.zero_stage == 0:
        raise RecipeError(
            "engine.offload_optimizer_to_cpu needs engine.zero_stage 1 or above.",
            next_step="Use engine=zero1, zero2 or zero3_offload.",
        )
    if engine.offload_parameters_to_cpu and engine.zero_stage != 3:
        raise RecipeError(
            f"engine.offload_parameters_to_cpu is set with zero_stage {engine.zero_stage}.",
            allowed="Only stage 3 partitions parameters.",
            next_step="Use engine=zero3_offload.",
        )


def _check_blending(recipe: Recipe) -> None:
    share = recipe.blending.budget_share
    if share and recipe.model.init == "random":
        raise RecipeError(
            f"blending.budget_share={share} would be ignored: model.init is random, so no activation is replaced.",
            next_step="Set blending.budget_share=0, or train from a checkpoint.",
        )
    if share and recipe.conversion.calibration_tokens:
        raise RecipeError(
            f"blending.budget_share={share} is set with a calibration, which has fitted the weights to "
            f"{recipe.activation.ffn_activation} before the first step.",
            next_step="Set blending.budget_share=0, or conversion=bare.",
        )
    _check_refits(recipe)


def _check_refits(recipe: Recipe) -> None:
    blending, training = recipe.blending, recipe.training
    milestones, tokens = blending.refit_milestones, blending.refit_tokens
    if not milestones:
        if tokens:
            raise RecipeError(
                f"blending.refit_tokens={tokens} would be ignored: blending.refit_milestones is 0.",
                next_step="Set blending.refit_milestones, or omit it.",
            )
        return
    blend_steps = int(blending.budget_share * recipe.num_steps + 1e-9)
    if not blending.budget_share:
        raise RecipeError(
            f"blending.refit_milestones={milestones} would be ignored: nothing is blended.",
            next_step="Set blending.budget_share, such as 0.5, or omit it.",
        )
    if not 2 <= milestones <= blend_steps:
        raise RecipeError(
            f"blending.refit_milestones is {milestones}.",
            allowed=f"0 (no refits), or 2 to {blend_steps}: no more than there are steps in the blending. A single refit before "
            "the first step is the calibrated replacement: conversion.calibration_tokens, without a blending schedule.",
        )
    least, most = 8 * training.sequence_length, recipe.num_steps * recipe.step_tokens
    if not least <= tokens <= most:
        raise RecipeError(
            f"blending.refit_tokens is {tokens}, with blending.refit_milestones={milestones}.",
            allowed=f"{least} to {most}: from eight sequences, one of which is held out, to the whole budget.",
        )


def check_blend(recipe: Recipe, base_ffn_activation: str) -> None:
    """Refuses a blending schedule from an activation to itself, once the checkpoint is known.

    Raises:
        RecipeError: Naming the setting.
    """
    share, activation = recipe.blending.budget_share, recipe.activation.ffn_activation
    if share and activation == base_ffn_activation:
        raise RecipeError(
            f"blending.budget_share={share} would be ignored: the checkpoint has {activation} already.",
            next_step="Set blending.budget_share=0, or choose another activation.",
        )


def _check_stages(recipe: Recipe) -> None:
    stages, before = recipe.penalty.stages, 0.0
    for number, stage in enumerate(stages):
        key, last = f"penalty.stages.{number}", number == len(stages) - 1
        end = stage.until_budget_share
        if not before < end <= 1 or (last and end != 1):
            raise RecipeError(
                f"{key}.until_budget_share is {end:g}.",
                allowed="Stages end one after another, above 0, and the last one at 1: "
                f"this one {'at 1' if last else f'above {before:g} and below 1'}.",
            )
        before = end
    if stages and not any(stage.weight for stage in stages):
        raise RecipeError(
            "penalty.stages have weight 0 throughout.",
            allowed="At least one weight above 0, or no stages at all.",
        )


def _check_penalty(recipe: Recipe) -> None:
    penalty, activation = recipe.penalty, recipe.activation.ffn_activation
    pressed = bool(penalty.stages) or penalty.target_zeros is not None
    if pressed and recipe.is_dense:
        key = "penalty.stages" if penalty.stages else "penalty.target_zeros"
        raise RecipeError(
            f"{key} is set with {activation}, which is never exactly zero.",
            next_step="Choose another activation, such as activation=drelu, set conversion.target_zeros, or omit it.",
        )
    share = penalty.gate_share
    if share and not pressed:
        raise RecipeError(
            f"penalty.gate_share={share} would be ignored: there is no penalty.",
            next_step="Set penalty.stages or penalty.target_zeros, or omit it.",
        )


def _check_target(recipe: Recipe) -> None:
    target = recipe.penalty.target_zeros
    if target is None:
        return
    if recipe.penalty.stages:
        raise RecipeError(
            "penalty.target_zeros and penalty.stages both set the penalty's weight.",
            next_step="Omit one of them.",
        )


def _check_distillation(recipe: Recipe) -> None:
    settings, model = recipe.distillation, recipe.model
    if not settings.is_on:
        return
    without_teacher = {
        "model.init=random": model.init == "random",
        f"model.upcycle_experts={model.upcycle_experts}": model.upcycle_experts is not None,
    }
    for setting, has_none in without_teacher.items():
        if has_none:
            raise RecipeError(
                f"{_distillation_key(recipe)} is set with {setting}: there is no dense model of this shape to learn from.",
                next_step="Omit it, or train from a checkpoint as it is.",
            )


def check_teacher(recipe: Recipe, base: tuple[str, float], *, differs: bool) -> None:
    """Refuses distillation from the very model that is trained, once the checkpoint is known.

    Args:
        recipe: What to train.
        base: Activation of the checkpoint that was converted, and its gate threshold.
        differs: Whether training starts from other weights than the dense source's, or under a mask.

    Raises:
        RecipeError: Naming the setting.
    """
    activation = recipe.activation
    same = base == (activation.ffn_activation, activation.model_gate_threshold)
    if recipe.distillation.is_on and same and not differs:
        raise RecipeError(
            f"{_distillation_key(recipe)} is set, and the checkpoint has {activation.ffn_activation} already: "
            "a model has nothing to learn from itself.",
            next_step="Set it to 0, or choose another activation.",
        )


def _distillation_key(recipe: Recipe) -> str:
    settings = recipe.distillation
    key = "logits_weight" if settings.logits_weight else "ffn_weight" if settings.ffn_weight else "squarehead_weight"
    return f"distillation.{key}={getattr(recipe.distillation, key):g}"


def _check_fused(recipe: Recipe) -> None:
    training = recipe.training
    if training.fused_activation == "off":
        if training.count_zeros:
            raise RecipeError(
                "training.count_zeros is set with training.fused_activation=off, where nothing counts them.",
                next_step="Set training.fused_activation=auto.",
            )
        return
    if training.fused_activation == "auto" and not training.count_zeros:
        return
    asked = "count_zeros" if training.count_zeros else "fused_activation"
    for key, without_kernel in {
        "blending.budget_share": recipe.blending.budget_share > 0,
        "conversion.target_zeros": recipe.conversion.target_zeros is not None,
        "conversion.target_density": recipe.conversion.target_density is not None,
    }.items():
        if without_kernel:
            raise RecipeError(
                f"training.{asked} is set with {key}, and there is no kernel for an activation changed by it.",
                next_step=f"Omit training.{asked}, or {key}.",
            )
    for key in ("activation", "baseline"):
        name = getattr(recipe, key).ffn_activation
        if name is not None and not ACTIVATIONS[name].has_training_kernel:
            with_one = activation_names(lambda row: row.has_training_kernel)
            raise RecipeError(
                f"training.{asked} is set, and there is no kernel for {key}.ffn_activation={name}.",
                allowed=f"Activations with one: {', '.join(with_one)}.",
                next_step="Omit it.",
            )


def _check_compile(recipe: Recipe) -> None:
    training, stage = recipe.training, recipe.engine.zero_stage
    if not training.compile:
        return
    if stage in (AUTO_STAGE, 3):
        raise RecipeError(
            "training.compile is set with " + ("engine=auto." if stage == AUTO_STAGE else "ZeRO-3."),
            allowed="ZeRO stage 0 to 2: stage 3 gathers weights between any two operations, which leaves nothing to fuse.",
            next_step="Use engine=zero2, or training.compile=false.",
        )
    for key, ignored in {
        "fused_activation": training.fused_activation in ("triton", "inductor"),
        "count_zeros": training.count_zeros,
    }.items():
        if ignored:
            raise RecipeError(
                f"training.{key} is set with training.compile, which fuses the model's own activation.",
                next_step=f"Omit training.{key}, or set training.compile=false.",
            )
    for key, changing in {
        "blending.budget_share": recipe.blending.budget_share > 0,
        "penalty.stages": bool(recipe.penalty.stages),
        "penalty.target_zeros": recipe.penalty.target_zeros is not None,
        "distillation.ffn_weight": recipe.distillation.ffn_weight > 0,
        "distillation.squarehead_weight": recipe.distillation.squarehead_weight > 0,
    }.items():
        if changing:
            raise RecipeError(
                f"training.compile is set with {key}, which needs forward hooks on every layer; torch.compile bypasses them.",
                next_step=f"Set training.compile=false, or omit {key}.",
            )


def _check_liger(recipe: Recipe) -> None:
    if not recipe.training.liger_kernels:
        return
    for key, without, why in (
        (
            "training.compile",
            recipe.training.compile,
            "the compiler fuses norms and rotary embedding itself",
        ),
        (
            "distillation.logits_weight",
            recipe.distillation.logits_weight > 0,
            "distillation compares whole logits, which Liger's loss never makes",
        ),
    ):
        if without:
            raise RecipeError(
                f"training.liger_kernels is set with {key}: {why}.",
                next_step=f"Set training.liger_kernels=false, or omit {key}.",
            )
