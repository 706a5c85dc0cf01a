"""Files of an evaluation: results.json, and the score of every item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsify.errors import EvaluationError
from sparsify.evaluation.metrics import MetricValue, Score
from sparsify.files import write_text
from sparsify.models.activations import is_dense

RESULTS_FILE = "results.json"
ITEMS_FOLDER, TEXTS_FOLDER = "items", "texts"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Provenance(_Section):
    """The run that trained a model."""

    run: str
    identity: str
    """Hash of what a run and its baseline must share: model, tokens and their order, optimiser, budget."""
    tokens: int
    """Training tokens that these weights have seen."""
    instruction_sources: list[str]


class ActiveCount(_Section):
    """Parameters that one token needs, of the whole model with embeddings."""

    total: int
    perfect_predictor: int
    """Only the neurons that fire, as if they were known in advance."""
    gate_first: int
    """With an exact kernel, which computes the whole gate to find the neurons that fire."""
    predicted: int | None = None
    """The neurons that the predictors switch on, plus the predictors themselves; None without predictors."""


class PredictorMasks(_Section):
    """Predictors that masked the model: each block computed only the neurons that they switch on."""

    folder: str
    hash: str
    """xxh3-128 over their matrices, input and threshold."""
    input: str
    threshold: float
    """A neuron is on if its score exceeds this."""
    parameters: int


class SourceOverlap(_Section):
    """Overlap of one source of a run's mixture with the items of one task: 13 words in a row."""

    source: str
    documents_read: int
    documents_overlapping: int
    items: int
    items_found: int
    problem: str | None = None
    """Why the source could not be read completely; None if it could."""


class TaskResult(_Section):
    """The result of one task."""

    name: str
    shots: int
    data: str
    """Description of where the items come from."""
    version: str
    metric: str
    """The metric that `score` holds."""
    score: MetricValue
    metrics: dict[str, MetricValue]
    """All metrics, including `metric`."""
    gate_zeros: float | None
    product_zeros: float | None
    """Shares of exact zeros of the gate, and of gate times up, over the tokens of this task; None if none were computed."""
    tokens: int
    """Tokens computed, including few-shot examples, without padding."""
    active_parameters: ActiveCount
    predicted_on: float | None = None
    """Share of the neurons that predictors switched on, over the tokens of this task; None without predictors."""
    predicted_recall: float | None = None
    """Share of the firing neurons of the masked model that were on; None without predictors."""
    truncated_requests: int
    """Requests longer than the context, whose beginning was cut off."""
    seconds: float
    """Compute time, summed over processes."""
    overlaps: list[SourceOverlap] = []
    """Overlap of these items with each instruction source that the model was trained on."""


class Sample(_Section):
    """A model's continuation of a prompt."""

    prompt: str
    text: str


class EvaluationResults(_Section):
    """Results of a suite on one model."""

    schema_version: Literal[1] = 1
    model: str
    model_hash: str
    """xxh3-128 over names, types, shapes and bytes of all weights, and the activation."""
    model_type: str
    ffn_activation: str
    is_masked: bool = False
    """Whether it stores a mask."""
    predictors: PredictorMasks | None = None
    """None if every neuron was computed."""
    dtype: str
    context_tokens: int
    suite: str
    limit: int | None
    batch_size: int
    processes: int = 1
    device: str
    fewshot_seed: int
    versions: dict[str, str]
    provenance: Provenance | None
    tasks: list[TaskResult]
    average: MetricValue | None
    """Mean over the tasks whose score is a mean; None if there are fewer than two."""
    samples: list[Sample] = []
    notes: list[str]
    command: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether neither its activation nor thresholds make exact zeros."""
        return is_dense(self.ffn_activation, is_masked=self.is_masked)


def write_items(folder: Path, task: str, items: Mapping[str, Mapping[str, Score]]) -> None:
    """Writes a task's scores: one line per item, with every metric as [value, weight]."""
    lines = [json.dumps({"item": key} | dict(scores)) for key, scores in items.items()]
    write_text(items_path(folder, task), "".join(f"{line}\n" for line in lines))


def read_items(folder: Path, task: str) -> dict[str, dict[str, Score]]:
    """Reads what `write_items` wrote.

    Raises:
        EvaluationError: If it is missing or damaged.
    """
    path = items_path(folder, task)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {row.pop("item"): {metric: Score(*score) for metric, score in row.items()} for row in rows}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"{path} does not hold the scores of {task}: {str(error).splitlines()[0]}",
            next_step=f"Remove {folder} and evaluate again.",
        ) from error


def read_results(folder: Path) -> EvaluationResults:
    """Reads the results of a folder.

    Raises:
        EvaluationError: If there are none, or they are damaged or of another version.
    """
    path = folder if folder.is_file() else folder / RESULTS_FILE
    try:
        return EvaluationResults.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise EvaluationError(
            f"{path} does not hold a finished evaluation of schema version 1: {str(error).splitlines()[0]}",
            next_step="Run `sparsify evaluate MODEL --suite NAME`; the same command resumes an interrupted evaluation.",
        ) from error


def items_path(folder: Path, task: str) -> Path:
    """Path of the scores of a task's items."""
    return folder / ITEMS_FOLDER / f"{task.replace('/', '.')}.jsonl"
