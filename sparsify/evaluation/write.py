"""Writes results for people and for model cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from omegaconf import OmegaConf

from sparsify.evaluation.results import RESULTS_FILE, EvaluationResults, TaskResult
from sparsify.evaluation.table import markdown, own_rows, published_rows
from sparsify.files import write_text

TABLE_FILE, CARD_FILE = "results.md", "model-index.yaml"


def write_results(results: EvaluationResults, folder: Path) -> None:
    """Writes results.json, results.md and model-index.yaml.

    Raises:
        StorageError: If the disk refuses.
    """
    write_text(folder / RESULTS_FILE, results.model_dump_json(indent=2) + "\n")
    tables = [own_rows(results), published_rows(results)]
    text = "\n".join(markdown(rows) for rows in tables if rows is not None)
    for sample in results.samples:
        text += f"\n**{sample.prompt.strip()}**\n\n```\n{sample.text}\n```\n"
    write_text(folder / TABLE_FILE, text)
    write_text(
        folder / CARD_FILE,
        OmegaConf.to_yaml({"model-index": model_index(Path(results.model).name, [results])}),
    )


def model_index(name: str, evaluations: Sequence[EvaluationResults]) -> list[dict[str, Any]]:
    """The part of a model card's header that the Hub shows as evaluation results.

    Args:
        name: The model's, as the Hub shall show it.
        evaluations: Of one model; with predictors they are metrics of their own.
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
