"""`sparsify bench proof`: what exact zeros cost and gain on a real model, against its dense baseline on the same tokens.

The runs are those of `sparsify bench recovery`, with the variants of `recipes/proof/`: a short search of the rate for each, then the
whole budget, then other seeds for the best. In addition the recipe's suite is evaluated before, along and after training, exports
are timed, and the loss gap is fitted against tokens. Everything that is finished is read from its files when the command is repeated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from pydantic import BaseModel, ConfigDict

from sparsify.bench.decode import time_export
from sparsify.bench.decode_result import ModelPoint
from sparsify.bench.recovery import DENSE, Recovery, RecoveryPlan, RecoveryRun, RecoveryVariant, bench_recovery
from sparsify.commands.evaluate import evaluate_model
from sparsify.compare.evaluations import TaskDifference, compare_evaluations
from sparsify.evaluation.request import EvalRequest
from sparsify.evaluation.results import RESULTS_FILE, read_results
from sparsify.export.bundle import export
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import checkpoint_name
from sparsify.sparsity.scaling import fit_scaling
from sparsify.sparsity.schema import ScalingFit
from sparsify.training.suite_results import EVALUATIONS, evaluation_folder

logger = logging.getLogger(__name__)

FOLDER = "proof/"
ADDITIONS = {
    "distilled": ("distillation.logits_weight=4.0",),
    "uneven": ("conversion.method=thresholds", "conversion.allocation=sensitivity"),
}
"""What the best variant is trained with in addition: distillation from the dense model (docs/blending.md), and uneven layer budgets."""
BEST = 3
"""Sparse variants that are trained with all seeds."""


class TaskScore(BaseModel):
    """A variant's score on one task at one moment.

    Attributes:
        tokens: Training tokens seen; 0 is before training.
        difference: Paired difference to the dense baseline after as many tokens; None for the baseline.
    """

    model_config = ConfigDict(frozen=True)

    variant: str
    tokens: int
    task: str
    metric: str
    value: float
    difference: TaskDifference | None


class GapFit(BaseModel):
    """The law `gap(D) = c / D^alpha + limit` of a variant's loss gap to the dense baseline after D billions of tokens.

    Attributes:
        fit: Of 1 - gap, to the law of Sparsing Law that rises towards a limit (arXiv 2411.02335, equation 3). Intervals follow from the
            spread of the points around the law, as if they were independent; what lies beyond the budget is extrapolation.
    """

    model_config = ConfigDict(frozen=True)

    variant: str
    fit: ScalingFit


class Proof(BaseModel):
    model_config = ConfigDict(frozen=True)

    recovery: Recovery
    scores: list[TaskScore] = []
    speeds: dict[str, ModelPoint] = {}
    """Decoding of each sparse variant's export and of its dense self, with the first seed."""
    fits: list[GapFit] = []


def proof_plan(plan: RecoveryPlan) -> RecoveryPlan:
    """The plan of the recovery benchmark with the proof's variants, additions and seeds."""
    return replace(plan, folder=FOLDER, additions=ADDITIONS, best=BEST)


def bench_proof(plan: RecoveryPlan, on_result: Callable[[Proof], object]) -> Proof:
    """Trains, evaluates and times what is not finished yet. `on_result` gets what is known after every run.

    Raises:
        RecipeError: If a variant does not exist, or a recipe is invalid.
        UserError: If a run or an evaluation fails.
    """
    recovery = bench_recovery(plan, lambda found: on_result(Proof(recovery=found, fits=gap_fits(found))))
    proof = Proof(recovery=recovery, fits=gap_fits(recovery))
    on_result(proof)
    for variant in recovery.variants:
        timed = _timed(RunFolder(Path(variant.runs[0].path)))
        if timed is not None:
            proof.speeds[variant.name] = timed
            on_result(proof)
    dense: dict[int, Path] = {}
    for variant in recovery.variants:
        evaluations = _evaluations(variant.runs[0])
        dense = dense or evaluations
        proof.scores.extend(_scores(variant.name, evaluations, dense))
        on_result(proof)
    return proof


def gap_fits(recovery: Recovery) -> list[GapFit]:
    """The fit of every sparse variant that has enough validations and whose gap follows the law."""
    fits = []
    for variant in recovery.variants:
        gaps = {tokens: gap for tokens, gap in gap_curve(recovery, variant).items() if tokens}
        fit = fit_scaling(list(gaps), [1 - gap for gap in gaps.values()], "silu") if variant.name != DENSE else None
        if fit is not None:
            fits.append(GapFit(variant=variant.name, fit=fit))
    return fits


def gap_curve(recovery: Recovery, variant: RecoveryVariant) -> dict[int, float]:
    """Loss gap to the dense baseline of the same seed by tokens, mean over the variant's seeds; nats per token."""
    dense = {run.seed: {point.tokens: point.loss for point in run.points} for run in recovery.dense.runs}
    return {
        points[0].tokens: fmean(
            point.loss - dense[run.seed][point.tokens] for run, point in zip(variant.runs, points, strict=True)
        )
        for points in zip(*(run.points for run in variant.runs), strict=True)
    }


def _timed(run: RunFolder) -> ModelPoint | None:
    if run.load_recipe().eval.time_decoding and not run.is_dense and not run.export.is_dir():
        export(run.path, run.export)
    return time_export(run, logger.debug)


def _evaluations(run: RecoveryRun) -> dict[int, Path]:
    """Folders of a run's evaluations by tokens seen; the converted checkpoint, before training, is evaluated here."""
    folder = RunFolder(Path(run.path))
    recipe = folder.load_recipe()
    if recipe.eval.suite is None:
        return {}
    request = EvalRequest.from_recipe(recipe.eval)
    before = folder.path / EVALUATIONS / f"{request.name},before"
    if not (before / RESULTS_FILE).is_file():
        logger.info(f"{run.variant}: evaluating before training")
        evaluate_model(
            str(folder.initial), replace(request, to=before), "sparsify bench proof", lambda _: lambda done, total: None
        )
    found = {0: before}
    for step in range(1, recipe.num_steps + 1):
        path = evaluation_folder(folder, checkpoint_name(step), request)
        if (path / RESULTS_FILE).is_file():
            found[step * recipe.step_tokens] = path
    return found


def _scores(variant: str, evaluations: dict[int, Path], dense: dict[int, Path]) -> list[TaskScore]:
    scores = []
    for tokens, folder in evaluations.items():
        differences: dict[str, TaskDifference] = {}
        if variant != DENSE and tokens in dense:
            differences = compare_evaluations([dense[tokens], folder]).models[1].differences
        scores += [
            TaskScore(
                variant=variant,
                tokens=tokens,
                task=task.name,
                metric=task.metric,
                value=task.score.value,
                difference=differences.get(task.name),
            )
            for task in read_results(folder).tasks
        ]
    return scores
