"""`engine=auto` of a run: resolved once, on the launcher, before recipe.yaml is written."""

from __future__ import annotations

import math
from pathlib import Path

from sparsify.plan import auto_sentence, resolve_engine, this_machine
from sparsify.recipe import AUTO_STAGE, Recipe
from sparsify.training.run_folder import RunFolder
from sparsify.verbs import Say

ENGINE_SETTINGS = ("zero_stage", "offload_optimizer_to_cpu", "offload_parameters_to_cpu")
TRAINING_SETTINGS = ("micro_batch_windows", "gradient_checkpointing")


def resolve_for_this_machine(recipe: Recipe, say: Say) -> Recipe:
    """Gives a recipe with `engine=auto` concrete numbers: those that its run began with, or else the cheapest that fit.

    Args:
        recipe: A composed recipe; one with a concrete stage is returned as it is.
        say: Told what was chosen and why.

    Raises:
        RecipeError: If nothing fits this machine.
    """
    if recipe.engine.zero_stage != AUTO_STAGE:
        return recipe
    hardware = this_machine(recipe.launch.processes, recipe.launch.nodes)
    begun = _begun(recipe)
    if begun is not None:
        for section, keys in (("engine", ENGINE_SETTINGS), ("training", TRAINING_SETTINGS)):
            for key in keys:
                setattr(getattr(recipe, section), key, getattr(getattr(begun, section), key))
        # Other processes go on with the same global batches, in whole micro-batches.
        windows = recipe.training.batch_windows // recipe.launch.total_processes
        recipe.training.micro_batch_windows = math.gcd(begun.training.micro_batch_windows, windows)
        say(f"engine=auto: ZeRO-{recipe.engine.zero_stage}, as this run began")
        return recipe
    resolved, choice = resolve_engine(recipe, hardware=hardware)
    assert choice is not None
    say(auto_sentence(choice, hardware))
    return resolved


def _begun(recipe: Recipe) -> Recipe | None:
    """What the run was begun with, where it has begun to train."""
    run = RunFolder(Path(recipe.run_dir))
    return run.load_recipe() if run.mixture_lock.is_file() else None
