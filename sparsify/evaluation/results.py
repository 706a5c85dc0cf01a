"""What an evaluation leaves behind: results.json, and the score of every item."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsify.errors import EvaluationError
from sparsify.evaluation.scores import Measured, Score
from sparsify.files import write_text
from sparsify.models.activations import is_dense

RESULTS_FILE = "results.json"
ITEMS_FOLDER, TEXTS_FOLDER = "items", "texts"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Provenance(_Section):
    """The run that trained a model: what a baseline must share with it."""

    run: str
    identity: str
    """Hash of everything that a run and its baseline have in common: model, tokens and their order, optimiser, budget."""
    tokens: int
    """Training tokens that these weights have seen."""
    instruction_sources: list[str]


class ActiveCount(_Section):
    """Parameters that one token needs, of the whole model with embeddings."""

    total: int
    perfect_predictor: int
    """If one knew beforehand which neurons will fire."""
    gate_first: int
    """By an exact kernel, which reads the whole gate to find out."""
    predicted: int | None = None
    """With the neurons that the given predictors switch on, and the predictors themselves; None without them."""


class PredictorMasks(_Section):
    """Predictors that masked the model: each block computed only the neurons that they switch on."""

    folder: str
    hash: str
    """xxh3-128 over their matrices, input and threshold."""
    input: str
    threshold: float
    """A neuron is on where its score exceeds it."""
    parameters: int


class SourceOverlap(_Section):
    """What one source of a run's mixture shares with the items of one task: 13 words in a row."""

    source: str
    documents_read: int
    documents_overlapping: int
    items: int
    items_found: int
    problem: str | None = None
    """Why the source could not be read to its end; None if it was."""


class TaskResult(_Section):
    """One task: a row of the table."""

    name: str
    shots: int
    data: str
    """Where its items came from, in words."""
    version: str
    metric: str
    """The metric that is the score."""
    score: Measured
    metrics: dict[str, Measured]
    """All metrics, the score among them."""
    gate_zeros: float | None
    product_zeros: float | None
    """Exact zeros of the gate, and of gate times up, over the tokens of this task. None if nothing was computed."""
    tokens: int
    """Tokens that went through the model, shots too, padding not."""
    active_parameters: ActiveCount
    predicted_on: float | None = None
    """Share of the neurons that predictors switched on, over the tokens of this task; None without them."""
    predicted_recall: float | None = None
    """Share of the neurons that fire, in the masked model, which were on."""
    truncated_requests: int
    """Requests whose beginning did not fit into the context and was cut off."""
    seconds: float
    """That processes spent on it, added up."""
    overlaps: list[SourceOverlap] = []
    """For each instruction source of the run that trained the model, what it shares with these items."""


class Sample(_Section):
    """How a model goes on from a prompt."""

    prompt: str
    text: str


class EvaluationResults(_Section):
    """A suite on one model."""

    schema_version: Literal[1] = 1
    model: str
    model_hash: str
    """xxh3-128 over names, types, shapes and bytes of all weights, and the activation."""
    model_type: str
    ffn_activation: str
    ffn_thresholds: str = "none"
    predictors: PredictorMasks | None = None
    """None where every neuron was computed."""
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
    average: Measured | None
    """Mean of the tasks' scores, where all of them are means and there is more than one."""
    samples: list[Sample] = []
    notes: list[str]
    command: str | None = None

    @property
    def is_dense(self) -> bool:
        """Whether neither its activation nor thresholds make exact zeros."""
        return is_dense(self.ffn_activation, self.ffn_thresholds)


def write_items(folder: Path, task: str, items: Mapping[str, Mapping[str, Score]]) -> None:
    """Writes a task's scores: one line an item, with every metric as [value, weight]."""
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
        return {
            row.pop("item"): {metric: Score(*score) for metric, score in row.items()}
            for row in rows
        }
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
            f"{path} holds no finished evaluation of schema version 1: {str(error).splitlines()[0]}",
            next_step="`sparsify evaluate MODEL --suite NAME` makes one; an interrupted one goes on by the same command.",
        ) from error


def items_path(folder: Path, task: str) -> Path:
    """Where the scores of a task's items stand."""
    return folder / ITEMS_FOLDER / f"{task.replace('/', '.')}.jsonl"
