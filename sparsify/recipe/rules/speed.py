"""Which settings that make training faster can work together, and what to say where they cannot.

Which settings of the suite that a run is asked while it trains can work, and what to say where they cannot.
"""

from __future__ import annotations

import math
from dataclasses import fields

from sparsify.errors import RecipeError
from sparsify.recipe.evaluation import EvalSection
from sparsify.recipe.recipe import (
    AUTO_STAGE,
    FUSED_ACTIVATION,
    FUSED_FFN_ACTIVATIONS,
    Recipe,
)
from sparsify.recipe.rules.source import check_choice


def check_speed(recipe: Recipe) -> None:
    """Refuses kernels and compiling where nothing could use them.

    Raises:
        RecipeError: Naming the setting.
    """
    _check_fused(recipe)
    _check_compile(recipe)
    _check_liger(recipe)


def _check_fused(recipe: Recipe) -> None:
    """Refuses kernels that an activation does not have, and zeros that nothing would count."""
    training = recipe.training
    check_choice("training.fused_activation", training.fused_activation, FUSED_ACTIVATION)
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
    }.items():
        if without_kernel:
            raise RecipeError(
                f"training.{asked} is set with {key}, and there is no kernel for what that makes of an activation.",
                next_step=f"Leave out training.{asked}, or {key}.",
            )
    for key in ("activation", "baseline"):
        name = getattr(recipe, key).ffn_activation
        if name is not None and name not in FUSED_FFN_ACTIVATIONS:
            raise RecipeError(
                f"training.{asked} is set, and there is no kernel for {key}.ffn_activation={name}.",
                allowed=f"Activations with one: {', '.join(FUSED_FFN_ACTIVATIONS)}.",
                next_step="Leave it out.",
            )


def _check_compile(recipe: Recipe) -> None:
    training, stage = recipe.training, recipe.engine.zero_stage
    if not training.compile:
        return
    if stage in (AUTO_STAGE, 3):
        raise RecipeError(
            "training.compile is set with "
            + ("engine=auto." if stage == AUTO_STAGE else "ZeRO-3."),
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
                next_step=f"Leave out training.{key}, or set training.compile=false.",
            )
    for key, changing in {
        "blending.budget_share": recipe.blending.budget_share > 0,
        "sparsity.penalty_stages": bool(recipe.sparsity.penalty_stages),
        "sparsity.target_zeros": recipe.sparsity.target_zeros is not None,
        "distillation.ffn_weight": recipe.distillation.ffn_weight > 0,
    }.items():
        if changing:
            raise RecipeError(
                f"training.compile is set with {key}, which looks into the layers at every step; a compiled layer is closed.",
                next_step=f"Set training.compile=false, or leave out {key}.",
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
                next_step=f"Set training.liger_kernels=false, or leave out {key}.",
            )


def check_suite(recipe: Recipe) -> None:
    """Refuses settings of a suite that is not asked, and times at which nothing is saved.

    Raises:
        RecipeError: Naming the setting.
    """
    settings, every = recipe.eval, recipe.checkpoint.every_tokens
    if settings.suite is None:
        for field in fields(EvalSection):
            value = getattr(settings, field.name)
            if field.name.startswith("suite_") and value != field.default:
                raise RecipeError(
                    f"eval.{field.name}={value} would be ignored: no suite is asked.",
                    next_step="Set eval.suite too, or leave it out.",
                )
        return
    for key in ("suite_every_tokens", "suite_limit", "suite_batch_size"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            raise RecipeError(f"eval.{key} is {value}.", allowed="It must be above 0.")
    suite_every = settings.suite_every_tokens
    if suite_every is not None and suite_every % every:
        raise RecipeError(
            f"eval.suite_every_tokens is {suite_every}, where no checkpoint is saved.",
            allowed=f"A multiple of checkpoint.every_tokens ({every}): a suite is asked of what was just saved.",
            next_step=f"Set eval.suite_every_tokens={math.ceil(suite_every / every) * every}.",
        )
