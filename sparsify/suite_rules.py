"""Which settings of the suite that a run is asked while it trains can work, and what to say where they cannot."""

from __future__ import annotations

import math
from dataclasses import fields

from sparsify.errors import RecipeError
from sparsify.recipe import Recipe
from sparsify.recipe_evaluation import EvalSection


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
