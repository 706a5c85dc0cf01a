"""`sparsify bench recovery`: how much of a dense model's quality each way of making it sparse wins back, on the same tokens.

Every arm is a recipe in `recipes/recovery/`. Each chooses its own peak learning rate by the same search: the first seed with every
rate, and the lowest final loss wins. The other seeds follow with that rate. All arms see the same windows in the same order,
because the data follow from the mixture and the seed alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.benchmarks.recovery_result import (
    DENSE,
    Recovery,
    RecoveryArm,
    RecoveryRun,
    read_run,
)
from sparsify.catalogue import compose_recipe, recipe_names
from sparsify.errors import RecipeError, nearest
from sparsify.recipe import Recipe
from sparsify.training.run_folder import RunFolder
from sparsify.verbs import Say
from sparsify.verbs.arm import train_run

FOLDER = "recovery/"
"""Of the catalogue: every recipe in it is an arm."""
FINAL_RATE_SHARE = 0.1
"""Of the peak, as in the quickstart."""


@dataclass(frozen=True)
class RecoveryPlan:
    """What the benchmark is to train.

    Attributes:
        to: Folder of the runs and of the result; a benchmark that was interrupted goes on there.
        arms: Names of recipes in `recipes/recovery/`; all of them if empty.
        rates: Peak learning rates that each arm may choose from.
        seeds: Of the data's order; the first is the one that searches.
        overrides: Of every arm, such as `model.source=…` and `mixture=…`.
    """

    to: Path
    arms: Sequence[str] = ()
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3)
    seeds: Sequence[int] = (1, 2, 3)
    overrides: Sequence[str] = field(default_factory=list)


def arm_names() -> list[str]:
    """All arms, the dense control first."""
    names = [name.removeprefix(FOLDER) for name in recipe_names() if name.startswith(FOLDER)]
    return sorted(names, key=lambda name: (name != DENSE, name))


def bench_recovery(plan: RecoveryPlan, say: Say) -> Recovery:
    """Trains what is not trained yet, and puts the arms side by side.

    Args:
        plan: What to train.
        say: Told what happens, a line at a time.

    Raises:
        RecipeError: If there is no such arm, nothing to choose from, or a recipe that cannot work.
        UserError: Whatever stops a run.
    """
    names = _chosen_arms(plan)
    recipes = {  # all of them before the first is trained
        (name, rate): _recipe(plan, name, rate, plan.seeds[0])
        for name in names
        for rate in plan.rates
    }
    arms: dict[str, tuple[dict[float, float], list[RecoveryRun]]] = {}
    for name in names:
        tried = [_run(recipes[name, rate], name, say) for rate in plan.rates]
        best = min(tried, key=lambda run: run.last.loss)
        others = [
            _run(_recipe(plan, name, best.peak_learning_rate, seed), name, say)
            for seed in plan.seeds[1:]
        ]
        searched = {run.peak_learning_rate: run.last.loss for run in tried}
        arms[name] = searched, [best, *others]
    dense = {run.seed: run.last.loss for run in arms[DENSE][1]}
    return Recovery(
        budget_tokens=arms[DENSE][1][0].last.tokens,
        seeds=list(plan.seeds),
        arms=[
            RecoveryArm(
                name=name,
                searched=searched,
                runs=runs,
                gaps=[run.last.loss - dense[run.seed] for run in runs],
            )
            for name, (searched, runs) in arms.items()
        ],
    )


def _chosen_arms(plan: RecoveryPlan) -> list[str]:
    known = arm_names()
    for name in plan.arms:
        if name not in known:
            raise RecipeError(
                f"There is no arm {name!r}.",
                allowed=f"{nearest(name, known)}Arms: {', '.join(known)}.",
                next_step="An arm is a recipe in recipes/recovery/.",
            )
    for option, values in (("--rates", plan.rates), ("--seeds", plan.seeds)):
        if not values or len(set(values)) != len(values):
            raise RecipeError(
                f"{option} is {', '.join(map(str, values)) or 'empty'}.",
                allowed="One or more, each once.",
            )
    wanted = {*plan.arms, DENSE} if plan.arms else set(known)
    return [name for name in known if name in wanted]


def _recipe(plan: RecoveryPlan, name: str, rate: float, seed: int) -> Recipe:
    own = [
        f"optimizer.peak_learning_rate={rate}",
        f"optimizer.final_learning_rate={rate * FINAL_RATE_SHARE}",
        f"training.seed={seed}",
    ]
    for override in plan.overrides:
        key = override.partition("=")[0]
        if key == "run_dir" or any(one.startswith(f"{key}=") for one in own):
            raise RecipeError(
                f"{override}: the benchmark sets {key} itself.",
                allowed="--rates, --seeds and --to say what it is.",
            )
    recipe = compose_recipe(f"{FOLDER}{name}", [*plan.overrides, *own])
    recipe.run_dir = str(plan.to / "runs" / name / f"rate={rate:g},seed={seed}")
    return recipe


def _run(recipe: Recipe, name: str, say: Say) -> RecoveryRun:
    say(f"{name}: rate {recipe.optimizer.peak_learning_rate:g}, seed {recipe.training.seed}")
    run = RunFolder(Path(recipe.run_dir))
    train_run(recipe, run, say)
    return read_run(run, name)
