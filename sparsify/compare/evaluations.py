"""Comparison of evaluations: paired differences on the same items, and their verdicts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sparsify.compare.settings import short_names
from sparsify.errors import EvaluationError
from sparsify.evaluation.metrics import Difference, MetricValue, difference
from sparsify.evaluation.results import (
    RESULTS_FILE,
    EvaluationResults,
    PredictorMasks,
    Sample,
    SourceOverlap,
    TaskResult,
    read_results,
    read_scores,
)
from sparsify.files import JsonRecord
from sparsify.metadata import user_path
from sparsify.training.suite_results import EVALUATIONS

Against = Literal["itself without predictors", "its dense baseline", "another model", "nothing"]
Verdict = Literal["better", "worse", "within noise"]


class TaskDifference(JsonRecord):
    """The difference of two models on one task, over the items that both have."""

    metric: str
    difference: Difference
    verdict: Verdict
    overlaps: list[SourceOverlap]
    """Overlap of the model's instruction data with the task's items."""

    @property
    def overlapping_items(self) -> int:
        """Items found in the source that has most of them."""
        return max((one.items_found for one in self.overlaps), default=0)


class EvaluatedModel(JsonRecord):
    name: str
    """The shortest name that differs from the others'."""
    path: str
    model_hash: str
    predictors: PredictorMasks | None
    """The predictors that masked the model; None if every neuron was computed."""
    ffn_activation: str
    weight_sparsity: float | None = None
    """Share of the weights of its projections that was set to zero; None for dense weights."""
    quantisation: str | None = None
    """What its integers are; None for numbers."""
    is_dense: bool
    """Whether neither its activation nor thresholds make exact zeros, and its weights are dense."""
    training_tokens: int | None
    """Training tokens of the run that trained it; None if unknown."""
    average: MetricValue | None
    tasks: dict[str, TaskResult]
    zeros: float | None
    """Share over the tokens of all tasks."""
    active_parameters: int
    """With its predictors, or with a perfect predictor if it has none; mean over the tokens of all tasks."""
    gate_first_parameters: int
    """With an exact gate-first kernel; equal to `active_parameters` with predictors."""
    against: str | None
    """Name of the model that it is compared with."""
    against_kind: Against
    differences: dict[str, TaskDifference]
    samples: list[Sample]


class EvaluationComparison(JsonRecord):
    schema_version: Literal[1] = 1
    kind: Literal["evaluations"] = "evaluations"
    suite: str
    models: list[EvaluatedModel]
    tasks: list[str]
    notes: list[str]
    command: str | None = None


def result_folders(paths: Sequence[Path]) -> list[Path] | None:
    """The evaluations at some paths; None if all paths are runs.

    A run among evaluations is replaced by its newest evaluation with the suite of the first evaluation.

    Raises:
        EvaluationError: If a run has no such evaluation.
    """
    own = [_result_folder(user_path(path)) for path in paths]
    if not any(own):
        return None
    suite = read_results(next(one for one in own if one is not None)).suite
    return [one or _newest(user_path(path), suite) for path, one in zip(paths, own, strict=True)]


def compare_evaluations(folders: Sequence[Path]) -> EvaluationComparison:
    """Reads and compares evaluations.

    A model that predictors mask is compared with the same weights without predictors. Any other model is compared with its
    dense baseline if that is given (same run except for the activation, same number of tokens), otherwise with the first one.

    Raises:
        EvaluationError: If there is only one, they are of different suites, or one cannot be read.
    """
    if len(folders) < 2:
        raise EvaluationError(
            f"{folders[0]} is one evaluation: there is nothing to compare it with.",
            next_step="Give a second one, ideally of its dense baseline: sparsify compare RESULT RESULT …",
        )
    results = [read_results(folder) for folder in folders]
    suites = list(dict.fromkeys(one.suite for one in results))
    if len(suites) > 1:
        raise EvaluationError(
            f"These are evaluations of different suites: {', '.join(suites)}.",
            next_step="Compare evaluations of one suite.",
        )
    names = _names(folders, results)
    models = [_model(index, names, folders, results) for index in range(len(folders))]
    tasks = dict.fromkeys(task.name for one in results for task in one.tasks)
    return EvaluationComparison(suite=suites[0], models=models, tasks=list(tasks), notes=[])


def _names(folders: Sequence[Path], results: Sequence[EvaluationResults]) -> list[str]:
    """Names by model if the models differ, otherwise by folder."""
    models = [user_path(one.model) for one in results]
    return short_names(models if len(set(models)) == len(models) else folders)


def _result_folder(path: Path) -> Path | None:
    if path.name == RESULTS_FILE:
        return path.parent
    return path if (path / RESULTS_FILE).is_file() else None


def _newest(run: Path, suite: str) -> Path:
    found = [path.parent for path in run.glob(f"{EVALUATIONS}/*/{RESULTS_FILE}") if read_results(path).suite == suite]
    if not found:
        raise EvaluationError(
            f"{run} has no evaluation of suite {suite}.",
            next_step=f"sparsify evaluate {run} --suite {suite}",
        )
    return max(found, key=lambda folder: (folder / RESULTS_FILE).stat().st_mtime)


def _model(
    index: int,
    names: Sequence[str],
    folders: Sequence[Path],
    results: Sequence[EvaluationResults],
) -> EvaluatedModel:
    own = results[index]
    against, kind = _against(index, results)
    differences = {}
    if against is not None:
        differences = _differences(own, folders[index], results[against], folders[against])
    weights = [max(task.tokens, 1) for task in own.tasks]

    def over_tokens(values: list[float]) -> float:
        return sum(map(float.__mul__, values, map(float, weights))) / sum(weights)

    active = [task.active_parameters for task in own.tasks]
    needed = [one.perfect_predictor if one.predicted is None else one.predicted for one in active]
    at_most = [one.gate_first if one.predicted is None else one.predicted for one in active]
    zeros = [task.product_zeros for task in own.tasks]
    known = [share for share in zeros if share is not None]
    return EvaluatedModel(
        name=names[index],
        path=str(folders[index]),
        model_hash=own.model_hash,
        predictors=own.predictors,
        ffn_activation=own.ffn_activation,
        weight_sparsity=own.weight_sparsity,
        quantisation=own.quantisation,
        is_dense=own.is_dense,
        training_tokens=own.provenance.tokens if own.provenance else None,
        average=own.average,
        tasks={task.name: task for task in own.tasks},
        zeros=over_tokens(known) if len(known) == len(zeros) else None,
        active_parameters=round(over_tokens(list(map(float, needed)))),
        gate_first_parameters=round(over_tokens(list(map(float, at_most)))),
        against=None if against is None else names[against],
        against_kind=kind,
        differences=differences,
        samples=own.samples,
    )


def _against(index: int, results: Sequence[EvaluationResults]) -> tuple[int | None, Against]:
    own = results[index].provenance
    if results[index].predictors is not None:
        for other, theirs in enumerate(results):
            if theirs.predictors is None and theirs.model_hash == results[index].model_hash:
                return other, "itself without predictors"
    for other, theirs in enumerate(results):
        if (
            own is not None
            and theirs.provenance is not None
            and theirs.is_dense
            and not results[index].is_dense
            and theirs.provenance.identity == own.identity
            and theirs.provenance.tokens == own.tokens
        ):
            return other, "its dense baseline"
    return (0, "another model") if index else (None, "nothing")


def _differences(
    own: EvaluationResults, folder: Path, theirs: EvaluationResults, other: Path
) -> dict[str, TaskDifference]:
    found = {}
    rows = {task.name: task for task in theirs.tasks}
    for task in own.tasks:
        if task.name not in rows or rows[task.name].metric != task.metric:
            continue
        scores = [read_scores(where, task.name, task.metric) for where in (folder, other)]
        paired = difference(task.score.kind, *scores)
        if paired is not None:
            found[task.name] = TaskDifference(
                metric=task.metric,
                difference=paired,
                verdict=_verdict(paired),
                overlaps=task.overlaps,
            )
    return found


def _verdict(paired: Difference) -> Verdict:
    if paired.within_noise:
        return "within noise"
    return "better" if paired.better else "worse"


def same_weights(models: Sequence[EvaluatedModel]) -> list[tuple[str, str]]:
    """Names of pairs with the same weights and the same predictors, if any."""
    return [
        (one.name, other.name)
        for one, other in itertools.combinations(models, 2)
        if one.model_hash == other.model_hash and _masks(one) == _masks(other)
    ]


def _masks(model: EvaluatedModel) -> str | None:
    return None if model.predictors is None else model.predictors.hash
