"""`sparsify bench recovery`: how much of a dense model's quality each sparsification variant recovers on the same tokens.

Every variant is a recipe in one folder of the catalogue, `recipes/recovery/` or `recipes/proof/`. The peak learning rate of each
variant is searched with the first seed: the rate with the lowest final loss is used for the other seeds. All variants see the same
sequences in the same order, because the data depend only on the mixture and the seed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.commands.run import train_run
from sparsify.errors import RecipeError, RunError, nearest
from sparsify.methods.base import check_method
from sparsify.recipe.catalogue import recipe_names
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.recipe import Recipe
from sparsify.runs.history import TRAINING_LABELS, read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.active_parameters import ffn_byte_shares

logger = logging.getLogger(__name__)

DENSE = "dense"
"""The variant that all others are compared with."""


class RecoveryPoint(BaseModel):
    """One validation of a run.

    Attributes:
        loss: Mean of the sources' losses by token share, nats per token.
        sources: Loss of each source; None of one without held-out text.
        zeros: Share of products that are exactly zero.
        gate_zeros: Share of gate factors that are exactly zero.
        blended_share: Weight of the sparse activation in the blend; 1 without blending.
    """

    model_config = ConfigDict(frozen=True)

    tokens: int
    loss: float
    sources: dict[str, float | None] = {}
    zeros: float
    gate_zeros: float
    blended_share: float

    @computed_field
    @property
    def gate_first_bytes(self) -> float:
        """Share of the feed-forward weights that an exact gate-first kernel reads for one token."""
        return ffn_byte_shares(self.gate_zeros, self.zeros)[0]

    @computed_field
    @property
    def predicted_bytes(self) -> float:
        """Share that a kernel with a perfect predictor reads, without the predictor's weights."""
        return ffn_byte_shares(self.gate_zeros, self.zeros)[1]


class RecoveryRun(BaseModel):
    model_config = ConfigDict(frozen=True)

    variant: str
    seed: int
    peak_learning_rate: float
    path: str
    points: list[RecoveryPoint]
    """Validations since the start of training: after the activation replacement, or from the dense base with blending."""

    @property
    def last(self) -> RecoveryPoint:
        return self.points[-1]


class RecoveryVariant(BaseModel):
    """A variant with the learning rate that its search chose.

    Attributes:
        name: Its recipe in the folder of variants.
        searched: Final loss of the first seed by peak learning rate.
        runs: One run per seed, with the best learning rate; all have the first seed.
        gaps: For each seed, its final loss minus that of the dense baseline with the same seed.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    searched: dict[float, float]
    runs: list[RecoveryRun]
    gaps: list[float]

    @property
    def peak_learning_rate(self) -> float:
        return self.runs[0].peak_learning_rate

    @computed_field
    @property
    def gap(self) -> float:
        """Mean of the gaps, nats per token."""
        return fmean(self.gaps)

    def mean(self, figure: str) -> float:
        return fmean(getattr(run.last, figure) for run in self.runs)

    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried, so that a better one may be outside the range."""
        return len(self.searched) > 1 and self.peak_learning_rate in (
            min(self.searched),
            max(self.searched),
        )


class Recovery(BaseModel):
    model_config = ConfigDict(frozen=True)

    budget_tokens: int
    seeds: list[int]
    variants: list[RecoveryVariant]

    @property
    def dense(self) -> RecoveryVariant:
        return next(variant for variant in self.variants if variant.name == DENSE)


def read_run(run: RunFolder, variant: str) -> RecoveryRun:
    """Reads a finished run's validations.

    Raises:
        RunError: If it was not evaluated at the end of its budget.
    """
    recipe = run.load_recipe()
    blended = recipe.blending.budget_share > 0
    records = read_lines(run.sparsity)
    validations = {
        (line["tokens"], line["label"]): line for line in read_lines(run.metrics) if line.get("kind") == "validation"
    }
    labels = {line["label"] for line in records}
    start = "after_replacement" if "after_replacement" in labels and not blended else "base"
    points = [
        RecoveryPoint(
            tokens=line["tokens"],
            loss=validations[line["tokens"], line["label"]]["loss"],
            sources=validations[line["tokens"], line["label"]]["sources"],
            zeros=line["zeros"],
            gate_zeros=line["gate_zeros"],
            blended_share=0.0 if blended and not line["tokens"] else line.get("blended_share", 1),
        )
        for line in records
        if line["label"] in (start, *TRAINING_LABELS)
    ]
    if not points or points[-1].tokens != recipe.num_steps * recipe.step_tokens:
        raise RunError(
            f"{run.path} was not evaluated at the end of its budget.",
            next_step="Run the same benchmark again: it resumes this run.",
        )
    return RecoveryRun(
        variant=variant,
        seed=recipe.training.seed,
        peak_learning_rate=recipe.optimizer.peak_learning_rate,
        path=str(run.path),
        points=points,
    )


FOLDER = "recovery/"
SEARCH_WARMUP_SHARE = 0.05
FINAL_RATE_SHARE = 0.1
"""Final learning rate as a share of the peak, as in the quickstart."""


@dataclass(frozen=True)
class RecoveryPlan:
    """Settings of the benchmark.

    Attributes:
        to: Folder of the runs and of the result; an interrupted benchmark resumes there.
        variants: Names of recipes in `folder`; empty for all of them.
        seeds: Seeds; the learning-rate search uses the first.
        overrides: Overrides for every variant, e.g. `model.source=…` and `mixture=…`.
        folder: Folder of the catalogue in which every recipe is a variant.
        search_tokens: Budget of the runs that search the rate; None searches with the whole budget.
        additions: Overrides by name that the variant with a mask and the lowest loss is trained with in addition, as VARIANT+NAME.
        best: Number of sparse variants that are trained with the other seeds, those with the lowest loss; None for all.
    """

    to: Path
    variants: Sequence[str] = ()
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3)
    seeds: Sequence[int] = (1, 2, 3)
    overrides: Sequence[str] = field(default_factory=list)
    folder: str = FOLDER
    search_tokens: int | None = None
    additions: Mapping[str, Sequence[str]] = field(default_factory=dict)
    best: int | None = None


def variant_names(folder: str = FOLDER) -> list[str]:
    """All variants, the dense baseline first."""
    names = [name.removeprefix(folder) for name in recipe_names() if name.startswith(folder)]
    return sorted(names, key=lambda name: (name != DENSE, name))


class _Found(NamedTuple):
    searched: dict[float, float]
    runs: list[RecoveryRun]

    @property
    def loss(self) -> float:
        """With the first seed."""
        return self.runs[0].last.loss


def bench_recovery(plan: RecoveryPlan, on_result: Callable[[Recovery], object] = lambda _: None) -> Recovery:
    """Trains the runs that are not finished yet, and compares the variants. `on_result` gets what is known after every run.

    Raises:
        RecipeError: If a variant does not exist, there are no rates or seeds, or a recipe is invalid.
        UserError: If a run fails.
    """
    names = _chosen_variants(plan)
    recipes = {  # all of them before the first is trained
        (name, rate): _recipe(plan, name, rate, plan.seeds[0]) for name in names for rate in plan.rates
    }
    masked = [name for name in names if recipes[name, plan.rates[0]].conversion.makes_mask]
    for name in masked:
        for addition in plan.additions:
            _recipe(plan, f"{name}+{addition}", plan.rates[0], plan.seeds[0])
    variants: dict[str, _Found] = {}
    for name in names:
        variants[name] = _searched(plan, name)
        on_result(_recovery(plan, variants))
    for addition in plan.additions if masked else ():
        name = f"{min(masked, key=lambda name: variants[name].loss)}+{addition}"
        variants[name] = _searched(plan, name)
        on_result(_recovery(plan, variants))
    sparse = sorted((name for name in variants if name != DENSE), key=lambda name: variants[name].loss)
    for seed in plan.seeds[1:]:
        for name in (DENSE, *sparse[: plan.best]):
            rate = variants[name].runs[0].peak_learning_rate
            variants[name].runs.append(_run(_recipe(plan, name, rate, seed), name))
            on_result(_recovery(plan, variants))
    return _recovery(plan, variants)


def _searched(plan: RecoveryPlan, name: str) -> _Found:
    """A variant's run with the first seed and the best rate, and the losses that chose it."""
    seed = plan.seeds[0]
    short = plan.search_tokens if len(plan.rates) > 1 else None
    first, *others = (_recipe(plan, name, rate, seed, short) for rate in plan.rates)
    converted = RunFolder(Path(first.run_dir))
    tried = [_run(first, name), *(_run(recipe, name, converted) for recipe in others)]
    best = min(tried, key=lambda run: run.last.loss)
    searched = {run.peak_learning_rate: run.last.loss for run in tried}
    whole = _recipe(plan, name, best.peak_learning_rate, seed)
    return _Found(searched, [_run(whole, name, converted) if short else best])


def _recovery(plan: RecoveryPlan, variants: Mapping[str, _Found]) -> Recovery:
    dense = {run.seed: run.last.loss for run in variants[DENSE].runs}
    return Recovery(
        budget_tokens=variants[DENSE].runs[0].last.tokens,
        seeds=list(plan.seeds),
        variants=[
            RecoveryVariant(
                name=name,
                searched=searched,
                runs=runs,
                gaps=[run.last.loss - dense[run.seed] for run in runs],
            )
            for name, (searched, runs) in variants.items()
        ],
    )


def _chosen_variants(plan: RecoveryPlan) -> list[str]:
    known = variant_names(plan.folder)
    for name in plan.variants:
        if name not in known:
            raise RecipeError(
                f"There is no variant {name!r}.",
                allowed=f"{nearest(name, known)}Variants: {', '.join(known)}.",
                next_step=f"A variant is a recipe in recipes/{plan.folder}.",
            )
    for option, values in (("--rates", plan.rates), ("--seeds", plan.seeds)):
        if not values or len(set(values)) != len(values):
            raise RecipeError(
                f"{option} is {', '.join(map(str, values)) or 'empty'}.",
                allowed="One or more, each once.",
            )
    wanted = {*plan.variants, DENSE} if plan.variants else set(known)
    return [name for name in known if name in wanted]


def _recipe(plan: RecoveryPlan, name: str, rate: float, seed: int, search_tokens: int | None = None) -> Recipe:
    """The recipe of one run: the variant's with its additions; of a search run with its short budget and without a suite."""
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
                allowed="Use --rates, --seeds and --to.",
            )
    variant, *additions = name.split("+")
    own += [override for addition in additions for override in plan.additions[addition]]
    recipe = compose_recipe(f"{plan.folder}{variant}", [*plan.overrides, *own])
    check_method(recipe.conversion)
    settings = f"rate={rate:g},seed={seed}"
    if search_tokens is not None:
        settings += f",search={search_tokens}"
        recipe.optimizer.warmup_tokens = min(recipe.optimizer.warmup_tokens, round(SEARCH_WARMUP_SHARE * search_tokens))
        recipe.training.budget_tokens = recipe.eval.every_tokens = search_tokens
        recipe.eval.suite = recipe.eval.suite_every_tokens = recipe.eval.suite_limit = None
        if recipe.num_steps < 1:
            raise RecipeError(f"--search-tokens is {search_tokens}.", allowed=f"A step or more: {recipe.step_tokens}.")
    recipe.run_dir = str(plan.to / "runs" / name / settings)
    return recipe


def _run(recipe: Recipe, name: str, converted: RunFolder | None = None) -> RecoveryRun:
    """Trains a run that is not finished, from the conversion of another one with the same seed where that is given."""
    logger.info(f"{name}: rate {recipe.optimizer.peak_learning_rate:g}, seed {recipe.training.seed}")
    run = RunFolder(Path(recipe.run_dir))
    train_run(recipe, run, converted=converted)
    return read_run(run, name)
