"""The weight of the activations' penalty in each step: by stages, or by the loop that ends at a target."""

from __future__ import annotations

from sparsify.recipe import Recipe
from sparsify.training.pressure import PressureRecord, stage_weight
from sparsify.training.target import Control, after_step, begin, weight


def penalty_weight(recipe: Recipe, control: dict[str, float], seen_tokens: int) -> float | None:
    """Weight for the step that begins after so many tokens; None where the recipe has no penalty.

    Args:
        recipe: The run's recipe.
        control: `TrainingState.control`.
        seen_tokens: Training tokens seen.
    """
    share = seen_tokens / _budget_tokens(recipe)
    if recipe.sparsity.penalty_stages:
        return stage_weight(recipe.sparsity.penalty_stages, share)
    if recipe.sparsity.target_zeros is None:
        return None
    state = Control.of(control)
    return 0.0 if state is None else weight(state, recipe.sparsity.target_zeros, share)


def next_control(
    recipe: Recipe,
    control: dict[str, float],
    seen_tokens: int,
    record: PressureRecord | None,
    loss: float,
    annealed_share: float,
) -> dict[str, float]:
    """`TrainingState.control` after a step; empty where there is no target, or while the anneal hides the zeros.

    Args:
        recipe: The run's recipe.
        control: What it was before the step.
        seen_tokens: Training tokens seen, the step's among them.
        record: What the step's penalty met.
        loss: The step's mean cross-entropy, in nats.
        annealed_share: How much of the sparse activation was in force in the step.
    """
    target = recipe.sparsity.target_zeros
    if target is None or record is None or annealed_share < 1:
        return control
    share = seen_tokens / _budget_tokens(recipe)
    state = Control.of(control)
    if state is None:
        return begin(share, record.zeros, loss, record.penalty).saved()
    step_share = recipe.step_tokens / _budget_tokens(recipe)
    return after_step(state, target, record.zeros, share, step_share).saved()


def _budget_tokens(recipe: Recipe) -> int:
    return recipe.num_steps * recipe.step_tokens
