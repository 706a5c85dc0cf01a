"""Which settings of a recipe can work together, and what to say where they cannot."""

from __future__ import annotations

import math
from dataclasses import asdict

from sparsify.errors import RecipeError
from sparsify.recipe.recipe import (
    ATTENTION_IMPLEMENTATIONS,
    AUTO_STAGE,
    ON_BAD_STEP,
    TORCHRUN,
    EngineSection,
    LaunchSection,
    ModelSection,
    Recipe,
)
from sparsify.recipe.rules.mixture import check_mixture
from sparsify.recipe.rules.source import check_choice
from sparsify.recipe.rules.sparsification import check_sparsification
from sparsify.recipe.rules.speed import check_speed, check_suite
from sparsify.recipe.sparsification import (
    FFN_ACTIVATIONS,
    GATE_THRESHOLDS,
    REFIT_TARGETS,
    ActivationSection,
    ConversionSection,
)


def validate(recipe: Recipe) -> Recipe:
    """Refuses settings that cannot work together.

    Returns:
        The same recipe; without a baseline where it would repeat the run itself.

    Raises:
        RecipeError: Naming the setting, its value, what is allowed and what to change.
    """
    _check_choices(recipe)
    _check_numbers(recipe)
    _check_model(recipe.model)
    _check_conversion(recipe)
    _check_batch(recipe)
    _check_engine(recipe)
    _check_nodes(recipe.launch)
    check_mixture(recipe.mixture)
    check_sparsification(recipe)
    check_speed(recipe)
    check_suite(recipe)
    if recipe.baseline.ffn_activation == recipe.activation.ffn_activation:
        recipe.baseline.ffn_activation = None
    return recipe


def _check_choices(recipe: Recipe) -> None:
    check_activation(recipe.activation)
    if recipe.baseline.ffn_activation is not None:
        check_choice("baseline.ffn_activation", recipe.baseline.ffn_activation, FFN_ACTIVATIONS)
    check_choice("model.init", recipe.model.init, ("pretrained", "random"))
    check_choice("stability.on_bad_step", recipe.stability.on_bad_step, ON_BAD_STEP)
    check_choice("training.precision", recipe.training.precision, ("bf16", "fp32"))
    check_choice("tracking.wandb", recipe.tracking.wandb, ("disabled", "offline", "online"))


def check_activation(
    activation: ActivationSection,
    name_key: str = "activation.ffn_activation",
    threshold_key: str = "activation.gate_threshold",
) -> None:
    """Refuses an activation that there is not, and a gate threshold that it would ignore.

    Args:
        activation: What was set.
        name_key: What the user knows its name by.
        threshold_key: What the user knows its threshold by.

    Raises:
        RecipeError: Naming the setting.
    """
    name, threshold = activation.ffn_activation, activation.gate_threshold
    check_choice(name_key, name, FFN_ACTIVATIONS)
    if threshold is not None and name not in GATE_THRESHOLDS:
        raise RecipeError(
            f"{threshold_key}={threshold:g} would be ignored: {name} has none.",
            allowed=f"Activations with a gate threshold: {', '.join(GATE_THRESHOLDS)}.",
            next_step="Leave it out, or choose one of them.",
        )
    if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
        raise RecipeError(f"{threshold_key} is {threshold}.", allowed="0 or above.")


def _check_numbers(recipe: Recipe) -> None:
    training, optimizer = recipe.training, recipe.optimizer
    positive = {
        "training.budget_tokens": training.budget_tokens,
        "training.sequence_length": training.sequence_length,
        "training.global_batch_size": training.global_batch_size,
        "training.micro_batch_size": training.micro_batch_size,
        "optimizer.peak_learning_rate": optimizer.peak_learning_rate,
        "optimizer.max_gradient_norm": optimizer.max_gradient_norm,
        "checkpoint.every_tokens": recipe.checkpoint.every_tokens,
        "checkpoint.keep_last": recipe.checkpoint.keep_last,
        "eval.every_tokens": recipe.eval.every_tokens,
        "eval.validation_sequences_per_source": recipe.eval.validation_sequences_per_source,
        "eval.report_tokens": recipe.eval.report_tokens,
        "launch.processes": recipe.launch.processes,
        "launch.nodes": recipe.launch.nodes,
        "launch.ingest_processes": recipe.launch.ingest_processes,
    }
    if not 0 <= recipe.eval.report_curve_tokens <= recipe.eval.report_tokens:
        raise RecipeError(
            f"eval.report_curve_tokens is {recipe.eval.report_curve_tokens}.",
            allowed=f"Allowed: 0 (no curves) to eval.report_tokens ({recipe.eval.report_tokens}).",
        )
    positive |= {
        f"stability.{key}": value
        for key, value in asdict(recipe.stability).items()
        if key != "on_bad_step" and value is not None
    }
    if recipe.launch.threads_per_process is not None:
        positive["launch.threads_per_process"] = recipe.launch.threads_per_process
    if recipe.checkpoint.keep_every_tokens is not None:
        positive["checkpoint.keep_every_tokens"] = recipe.checkpoint.keep_every_tokens
    for key, value in positive.items():
        if not value > 0 or not math.isfinite(value):
            raise RecipeError(f"{key} is {value}.", allowed="It must be above 0.")
    if not recipe.stability.max_bad_steps < recipe.stability.recent_steps:
        raise RecipeError(
            f"stability.max_bad_steps is {recipe.stability.max_bad_steps}, which would never be reached.",
            allowed=f"It must be below stability.recent_steps ({recipe.stability.recent_steps}).",
        )
    coefficient = training.router_aux_loss_coefficient
    if coefficient is not None and not 0 <= coefficient < math.inf:
        raise RecipeError(
            f"training.router_aux_loss_coefficient is {coefficient}.",
            allowed="0 or above; null takes the checkpoint's own.",
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


def _check_model(model: ModelSection) -> None:
    if model.init == "pretrained" and model.source is None:
        raise RecipeError(
            "model.init is pretrained, but model.source is not set.",
            allowed="A checkpoint folder, a Hub id, a GGUF file or package:NAME/PATH.",
            next_step="Set model.source, or model.init=random with model.architecture.",
        )
    if model.init == "random" and model.source is not None:
        raise RecipeError(
            f"model.init is random, so model.source={model.source} would be ignored.",
            next_step="Set model.source=null, or model.init=pretrained.",
        )
    if model.init == "random" and not (model.architecture and model.tokenizer):
        raise RecipeError(
            "model.init is random, but model.architecture or model.tokenizer is not set.",
            allowed="A random model needs both: its config fields and a tokenizer.",
        )
    experts = model.upcycle_experts
    if experts is not None and not 1 <= model.upcycle_experts_per_token <= experts:
        raise RecipeError(
            f"model.upcycle_experts_per_token is {model.upcycle_experts_per_token}.",
            allowed=f"Allowed: 1 to model.upcycle_experts ({experts}).",
        )


def _check_conversion(recipe: Recipe) -> None:
    conversion, least = recipe.conversion, 8 * recipe.training.sequence_length
    if conversion.calibration_tokens == 0:
        settings, defaults = asdict(conversion), asdict(ConversionSection())
        if recipe.blending.refit_milestones:
            check_conversion(conversion)
            del settings["ridge"]
        for key in (key for key in settings if settings[key] != defaults[key]):
            raise RecipeError(
                f"conversion.{key}={settings[key]} would be ignored: nothing is calibrated.",
                next_step="Set conversion.calibration_tokens too, or leave it out.",
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
            allowed="Only a trained model has answers to be kept.",
            next_step="Leave it out, or give model.source.",
        )


def check_conversion(conversion: ConversionSection) -> None:
    """Refuses settings of the calibrated replacement that cannot be met.

    Raises:
        RecipeError: Naming the setting.
    """
    check_choice("conversion.refit_target", conversion.refit_target, tuple(REFIT_TARGETS))
    if not 0 < conversion.ridge < math.inf:
        raise RecipeError(f"conversion.ridge is {conversion.ridge}.", allowed="Above 0.")
    if conversion.target_zeros is not None and not 0 < conversion.target_zeros < 1:
        raise RecipeError(
            f"conversion.target_zeros is {conversion.target_zeros}.",
            allowed="A share between 0 and 1, such as 0.9; null sets no thresholds.",
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


def _check_nodes(launch: LaunchSection) -> None:
    if not 0 <= launch.node_rank < launch.nodes:
        raise RecipeError(
            f"launch.node_rank is {launch.node_rank} of launch.nodes={launch.nodes}.",
            allowed=f"Allowed: 0 to {launch.nodes - 1}.",
        )
    if launch.hostfile is not None or launch.rendezvous == TORCHRUN:
        source = "launch.hostfile" if launch.hostfile is not None else "launch.rendezvous=torchrun"
        both = launch.hostfile is not None and launch.rendezvous is not None
        if both or launch.nodes > 1 or launch.node_rank > 0:
            raise RecipeError(
                f"{source} is set beside launch.nodes={launch.nodes}, launch.node_rank={launch.node_rank}, "
                f"launch.rendezvous={launch.rendezvous}.",
                allowed="It says all of these itself.",
                next_step="Leave the others out.",
            )
        return
    host, _, port = (launch.rendezvous or "").rpartition(":")
    if launch.nodes == 1 and launch.rendezvous is not None:
        raise RecipeError(
            f"launch.rendezvous={launch.rendezvous} would be ignored: launch.nodes is 1.",
            next_step="Set launch.nodes, or leave out launch.rendezvous.",
        )
    if launch.nodes > 1 and not (host and port.isdigit()):
        raise RecipeError(
            f"launch.nodes is {launch.nodes}, and launch.rendezvous is {launch.rendezvous}.",
            allowed="HOST:PORT of node 0, the same for every node.",
            next_step="Set launch.rendezvous, such as node0.cluster:29400.",
        )


def _check_engine(recipe: Recipe) -> None:
    engine = recipe.engine
    _check_auto(engine)
    if engine.zero_stage not in (AUTO_STAGE, 0, 1, 2, 3):
        raise RecipeError(
            f"engine.zero_stage is {engine.zero_stage}.", allowed="Allowed: 0 to 3, or engine=auto."
        )
    check_choice("engine.attention", engine.attention, ATTENTION_IMPLEMENTATIONS)
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


def _check_auto(engine: EngineSection) -> None:
    """Refuses what `engine=auto` would silently replace, and what only it knows."""
    if engine.zero_stage != AUTO_STAGE:
        for key in ("auto_micro_batch", "auto_checkpointing", "auto_offload"):
            if not getattr(engine, key):
                raise RecipeError(
                    f"engine.{key} is false with engine.zero_stage={engine.zero_stage}, where nothing is chosen.",
                    next_step="Use engine=auto, or leave it out.",
                )
        return
    for key in ("offload_optimizer_to_cpu", "offload_parameters_to_cpu"):
        if getattr(engine, key):
            raise RecipeError(
                f"engine.{key} is set with engine=auto, which decides it.",
                next_step="Leave it out, or use engine=zero3_offload.",
            )
