"""Files of an evaluation: results.json, and the score of every item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sparsify.errors import EvaluationError
from sparsify.evaluation.metrics import MetricValue, Score
from sparsify.files import JsonRecord, write_text
from sparsify.metadata import parse_json, read_record, text_lines
from sparsify.models.activations import is_dense

RESULTS_FILE = "results.json"
ITEMS_FOLDER, TEXTS_FOLDER = "items", "texts"


class Provenance(JsonRecord):
    run: str
    identity: str
    """Hash of what a run and its baseline must share: model, tokens and their order, optimiser, budget."""
    tokens: int
    """Training tokens that these weights have seen."""
    instruction_sources: list[str]


class ActiveCount(JsonRecord):
    """Parameters that one token needs, of the whole model with embeddings."""

    total: int
    perfect_predictor: int
    """Only the neurons that fire, as if they were known in advance."""
    gate_first: int
    """With an exact kernel, which computes the whole gate to find the neurons that fire."""
    predicted: int | None = None
    """The neurons that the predictors switch on, plus the predictors themselves; None without predictors."""


class PredictorMasks(JsonRecord):
    """Predictors that masked the model: each block computed only the neurons that they switch on."""

    folder: str
    hash: str
    """xxh3-128 over their matrices, input and threshold."""
    input: str
    threshold: float
    """A neuron is on if its score exceeds this."""
    parameters: int


class SourceOverlap(JsonRecord):
    """Overlap of one source of a run's mixture with the items of one task: 13 words in a row."""

    source: str
    documents_read: int
    documents_overlapping: int
    items: int
    items_found: int
    problem: str | None = None
    """Why the source could not be read completely; None if it could."""


class TaskResult(JsonRecord):
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
    overlaps: list[SourceOverlap] = Field(default_factory=list)
    """Overlap of these items with each instruction source that the model was trained on."""


class Sample(JsonRecord):
    prompt: str
    text: str


class EvaluationResults(JsonRecord):
    schema_version: Literal[1] = 1
    model: str
    model_hash: str
    """xxh3-128 over names, types, shapes and bytes of all weights, and the activation."""
    model_type: str
    ffn_activation: str
    is_masked: bool = False
    """Whether it stores a mask."""
    weight_sparsity: float | None = None
    """Share of the weights of its projections that was set to zero; None for dense weights."""
    quantisation: str | None = None
    """What its integers are, such as W4A4 by rrs; None for numbers."""
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
    samples: list[Sample] = Field(default_factory=list)
    notes: list[str]
    command: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether neither its activation nor thresholds make exact zeros, and its weights are dense numbers."""
        plain = self.weight_sparsity is None and self.quantisation is None
        return plain and is_dense(self.ffn_activation, is_masked=self.is_masked)


def write_items(folder: Path, task: str, items: Mapping[str, Mapping[str, Score]]) -> None:
    """Writes a task's scores: one line per item, with every metric as [value, weight]."""
    lines = [json.dumps({"item": key} | dict(scores)) for key, scores in items.items()]
    write_text(items_path(folder, task), "".join(f"{line}\n" for line in lines))


def read_items(folder: Path, task: str) -> dict[str, dict[str, Score]]:
    """Reads what `write_items` wrote.

    Raises:
        EvaluationError: If it is missing or damaged.
    """
    path, again = items_path(folder, task), f"Remove {folder} and evaluate again."
    items: dict[str, dict[str, Score]] = {}
    for number, line in enumerate(text_lines(path, EvaluationError, again), start=1):
        try:
            if line:
                item, scores = _item(parse_json(line))
                items[item] = scores
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise EvaluationError(
                f"{path} does not hold the scores of {task}: line {number}: {error}", next_step=again
            ) from error
    return items


def read_scores(folder: Path, task: str, metric: str) -> dict[str, Score]:
    """One metric of every item of a task.

    Raises:
        EvaluationError: If the scores are missing or damaged, or an item has no such metric.
    """
    items = read_items(folder, task)
    without = next((item for item, scores in items.items() if metric not in scores), None)
    if without is not None:
        raise EvaluationError(
            f"{items_path(folder, task)} does not hold the scores of {task}: {without[:80]!r} has no {metric}",
            next_step=f"Remove {folder} and evaluate again.",
        )
    return {item: scores[metric] for item, scores in items.items()}


def _item(row: dict[str, Any]) -> tuple[str, dict[str, Score]]:
    return str(row.pop("item")), {metric: Score(float(value), float(weight)) for metric, (value, weight) in row.items()}


def read_results(folder: Path) -> EvaluationResults:
    """Reads the results of a folder.

    Raises:
        EvaluationError: If there are none, or they are damaged or of another version.
    """
    path = folder if folder.is_file() else folder / RESULTS_FILE
    again = "Run `sparsify evaluate MODEL --suite NAME`; the same command resumes an interrupted evaluation."
    return read_record(path, EvaluationResults, "a finished evaluation of schema version 1", EvaluationError, again)


def items_path(folder: Path, task: str) -> Path:
    return folder / ITEMS_FOLDER / f"{task.replace('/', '.')}.jsonl"
