"""Which settings of `swap`, `sparsity` and `distillation` can work together, and what to say where they cannot."""

from __future__ import annotations

import math
from dataclasses import asdict

from sparsify.errors import RecipeError
from sparsify.recipe.recipe import Recipe

WITHOUT_ZEROS = ("swiglu",)
"""Activations that are almost never exactly zero, however small a penalty makes them."""


def check_sparsification(recipe: Recipe) -> None:
    """Refuses what cannot make a model sparser.

    Raises:
        RecipeError: Naming the setting.
    """
    _check_swap(recipe)
    _check_stages(recipe)
    _check_penalty(recipe)
    _check_target(recipe)
    _check_distillation(recipe)


def _check_swap(recipe: Recipe) -> None:
    share = recipe.blending.budget_share
    if not 0 <= share < 1:
        raise RecipeError(
            f"blending.budget_share is {share}.",
            allowed="0 (swap at once) or above, and below 1: the run must end with the activation itself.",
        )
    if share and recipe.model.init == "random":
        raise RecipeError(
            f"blending.budget_share={share} would be ignored: model.init is random, so nothing is swapped.",
            next_step="Set blending.budget_share=0, or train from a checkpoint.",
        )
    if share and recipe.conversion.calibration_tokens:
        raise RecipeError(
            f"blending.budget_share={share} is set with a calibration, which has fitted the weights to "
            f"{recipe.activation.ffn_activation} before the first step.",
            next_step="Set blending.budget_share=0, or conversion.calibration_tokens=0.",
        )
    _check_refits(recipe)


def _check_refits(recipe: Recipe) -> None:
    blending, training = recipe.blending, recipe.training
    milestones, tokens = blending.refit_milestones, blending.refit_tokens
    if not milestones:
        if tokens:
            raise RecipeError(
                f"blending.refit_tokens={tokens} would be ignored: blending.refit_milestones is 0.",
                next_step="Set blending.refit_milestones, or leave it out.",
            )
        return
    blend_steps = int(blending.budget_share * recipe.num_steps + 1e-9)
    if not blending.budget_share:
        raise RecipeError(
            f"blending.refit_milestones={milestones} would be ignored: nothing is blended.",
            next_step="Set blending.budget_share, such as 0.5, or leave it out.",
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
            allowed=f"{least} to {most}: eight sequences, of which one judges what the others found, to the whole budget.",
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
    stages, before = recipe.sparsity.penalty_stages, 0.0
    for number, stage in enumerate(stages):
        key, last = f"sparsity.penalty_stages.{number}", number == len(stages) - 1
        end = stage.until_budget_share
        if not before < end <= 1 or (last and end != 1):
            raise RecipeError(
                f"{key}.until_budget_share is {end:g}.",
                allowed="Stages end one after another, above 0, and the last one at 1: "
                f"this one {'at 1' if last else f'above {before:g} and below 1'}.",
            )
        if not 0 <= stage.weight < math.inf:
            raise RecipeError(f"{key}.weight is {stage.weight}.", allowed="0 or above.")
        before = end
    if stages and not any(stage.weight for stage in stages):
        raise RecipeError(
            "sparsity.penalty_stages have weight 0 throughout.",
            allowed="At least one weight above 0, or no stages at all.",
        )


def _check_penalty(recipe: Recipe) -> None:
    sparsity, activation = recipe.sparsity, recipe.activation.ffn_activation
    pressed = bool(sparsity.penalty_stages) or sparsity.target_zeros is not None
    thresholds = recipe.conversion.target_zeros is not None
    if pressed and activation in WITHOUT_ZEROS and not thresholds:
        key = "sparsity.penalty_stages" if sparsity.penalty_stages else "sparsity.target_zeros"
        raise RecipeError(
            f"{key} is set with {activation}, which is never exactly zero.",
            next_step="Choose another activation, such as activation=drelu, set conversion.target_zeros, or leave it out.",
        )
    share = sparsity.gate_penalty_share
    if not 0 <= share <= 1:
        raise RecipeError(f"sparsity.gate_penalty_share is {share}.", allowed="Allowed: 0 to 1.")
    if share and not pressed:
        raise RecipeError(
            f"sparsity.gate_penalty_share={share} would be ignored: there is no penalty.",
            next_step="Set sparsity.penalty_stages or sparsity.target_zeros, or leave it out.",
        )


def _check_target(recipe: Recipe) -> None:
    target = recipe.sparsity.target_zeros
    if target is None:
        return
    if not 0 < target < 1:
        raise RecipeError(
            f"sparsity.target_zeros is {target}.", allowed="Above 0 and below 1, such as 0.9."
        )
    if recipe.sparsity.penalty_stages:
        raise RecipeError(
            "sparsity.target_zeros and sparsity.penalty_stages both say what the penalty's weight is.",
            next_step="Leave one of them out.",
        )


def _check_distillation(recipe: Recipe) -> None:
    settings, model = recipe.distillation, recipe.model
    for key, weight in asdict(settings).items():
        if not 0 <= weight < math.inf:
            raise RecipeError(
                f"distillation.{key} is {weight}.", allowed="0 (leave it out) or above."
            )
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
                next_step="Leave it out, or train from a checkpoint as it is.",
            )


def check_teacher(recipe: Recipe, base: tuple[str, float], *, is_calibrated: bool) -> None:
    """Refuses distillation from the very model that is trained, once the checkpoint is known.

    Args:
        recipe: What to train.
        base: Activation of the checkpoint that was converted, and its gate threshold.
        is_calibrated: Whether the conversion changed weights or set thresholds.

    Raises:
        RecipeError: Naming the setting.
    """
    activation = recipe.activation
    same = base == (activation.ffn_activation, activation.model_gate_threshold)
    if recipe.distillation.is_on and same and not is_calibrated:
        raise RecipeError(
            f"{_distillation_key(recipe)} is set, and the checkpoint has {activation.ffn_activation} already: "
            "a model has nothing to learn from itself.",
            next_step="Set it to 0, or choose another activation.",
        )


def _distillation_key(recipe: Recipe) -> str:
    key = "logits_weight" if recipe.distillation.logits_weight else "ffn_weight"
    return f"distillation.{key}={getattr(recipe.distillation, key):g}"
