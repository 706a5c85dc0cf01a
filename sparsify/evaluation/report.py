"""Results as tables (terminal, Markdown, model card), with published scores of other models for reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict

from sparsify.evaluation.metrics import MetricValue
from sparsify.evaluation.results import RESULTS_FILE, EvaluationResults, TaskResult
from sparsify.files import write_text
from sparsify.recipe.catalogue import folder
from sparsify.reporting.numbers import percent
from sparsify.reporting.tables import Table, markdown_page


class PublishedSuite(BaseModel):
    """Published rows of one suite."""

    model_config = ConfigDict(extra="forbid")

    source: str
    columns: list[str]
    models: dict[str, list[float]]
    """Scores in per cent, as published."""
    caveat: str


@cache
def published() -> dict[str, PublishedSuite]:
    suites = OmegaConf.to_container(OmegaConf.load(folder("eval") / "published" / "turbosparse.yaml"))
    assert isinstance(suites, dict)
    return {str(name): PublishedSuite.model_validate(rows) for name, rows in suites.items()}


def published_scores(suite: str) -> tuple[PublishedSuite, dict[str, dict[str, float]]] | None:
    """The published rows of a suite and the score of each task by model, as a share; None if there are none."""
    rows = published().get(suite)
    if rows is None:
        return None
    scores = {
        model: {task: value / 100 for task, value in zip(rows.columns, values, strict=True)}
        for model, values in rows.models.items()
    }
    return rows, scores


def score_text(score: MetricValue) -> str:
    """A score with half the width of its interval: accuracies in per cent, perplexities unscaled."""
    scale, digits = (100.0, 1) if score.kind == "mean" else (1.0, 2)
    value = f"{scale * score.value:.{digits}f}"
    if score.low is None or score.high is None:
        return value
    if score.kind == "perplexity":
        return f"{value} [{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return f"{value} ± {scale * (score.high - score.low) / 2:.{digits}f}"


def count_text(count: int) -> str:
    """A rounded number of parameters: 134M, 2.17B."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def results_table(results: EvaluationResults) -> Table:
    """One row per task: score, zeros and active parameters."""
    masks = results.predictors
    header = ["task", "shots", "items", "metric", "score", "zeros (gate)", "active"]
    header += [] if masks is None else ["switched on"]
    rows = [_row(task) for task in results.tasks]
    if results.average is not None:
        items = f"{results.average.items:,}"
        rows.append(
            [
                "mean of accuracies",
                "",
                items,
                "",
                score_text(results.average),
                *[""] * (len(header) - 5),
            ]
        )
    total = results.tasks[0].active_parameters.total
    active = "with a perfect predictor / with an exact gate-first kernel"
    how = f"{results.ffn_activation}, {results.dtype}"
    if masks is not None:
        how += f", only neurons that {masks.folder} scores above {masks.threshold:g}"
        active = (
            f"with these predictors, including their own {count_text(masks.parameters)}. Switched on: share of all neurons "
            "(in brackets: of the neurons that fire in the masked model)"
        )
    title = f"{results.model}: suite {results.suite} ({how})"
    notes = [
        "Scores with 95% intervals over items; accuracies in per cent. Zeros: exact zeros of gate times up (in brackets: "
        f"of the gate) over all tokens of the task. Active parameters, out of {count_text(total)}: {active}.",
        *results.notes,
    ]
    return Table(title, header, rows, notes, left=(0, 3))


def published_table(results: EvaluationResults) -> Table | None:
    """Our scores next to published ones of the same suite; None if there are none."""
    found = published_scores(results.suite)
    if found is None:
        return None
    about, models = found
    ours = {task.name: task.score for task in results.tasks if task.name in about.columns}
    header = ["task", "this model", *(f"{model} (published)" for model in models)]
    rows = [
        [task, score_text(ours[task]) if task in ours else "–"]
        + [f"{100 * scores[task]:.1f}" for scores in models.values()]
        for task in about.columns
    ]
    whole = len(ours) == len(about.columns)
    mean = f"{100 * fmean(one.value for one in ours.values()):.1f}" if whole else "–"
    means = [f"{100 * fmean(scores.values()):.1f}" for scores in models.values()]
    rows.append(["mean", mean, *means])
    notes = [f"Published: {about.source}, not measured here. {about.caveat}"]
    return Table("Next to published scores", header, rows, notes)


def _row(task: TaskResult) -> list[str]:
    active = task.active_parameters
    cells = [
        task.name,
        str(task.shots),
        f"{task.score.items:,}",
        task.metric,
        score_text(task.score),
        f"{percent(task.product_zeros)} ({percent(task.gate_zeros)})",
        f"{count_text(active.perfect_predictor)} / {count_text(active.gate_first)}",
    ]
    if active.predicted is not None:
        cells[-1] = count_text(active.predicted)
        cells.append(f"{percent(task.predicted_on)} ({percent(task.predicted_recall)})")
    return cells


TABLE_FILE, CARD_FILE = "results.md", "model-index.yaml"


def write_results(results: EvaluationResults, folder: Path) -> None:
    write_text(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    tables = [results_table(results), published_table(results)]
    text = markdown_page(table for table in tables if table is not None)
    for sample in results.samples:
        text += f"\n**{sample.prompt.strip()}**\n\n```\n{sample.text}\n```\n"
    write_text(folder / TABLE_FILE, text)
    write_text(
        folder / CARD_FILE,
        OmegaConf.to_yaml({"model-index": model_index(Path(results.model).name, [results])}),
    )


def model_index(name: str, evaluations: Sequence[EvaluationResults]) -> list[dict[str, Any]]:
    """The `model-index` of a model card, which the Hub shows as evaluation results; evaluations with predictors become
    separate metrics.
    """
    entries = [_entry(results, task) for results in evaluations for task in results.tasks]
    return eval_results_to_model_index(model_name=name, eval_results=entries)


def _entry(results: EvaluationResults, task: TaskResult) -> EvalResult:
    masks = results.predictors
    return EvalResult(
        task_type="text-generation",
        task_name=f"{task.name} ({task.shots} shots)",
        dataset_type=task.name,
        dataset_name=f"{task.name} ({task.data})",
        metric_type="accuracy" if task.score.kind == "mean" else "perplexity",
        metric_name=task.metric if masks is None else f"{task.metric}, masked by predictors",
        metric_value=round(task.score.value, 6),
        metric_args={
            "low": task.score.low,
            "high": task.score.high,
            "items": task.score.items,
            "limit": results.limit,
            "dtype": results.dtype,
            "exact_zeros": task.product_zeros,
            "predictor_threshold": None if masks is None else masks.threshold,
            "predicted_on": task.predicted_on,
            "lm_eval": results.versions["lm-eval"],
        },
    )
