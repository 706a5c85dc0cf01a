"""What a run's JSON lines say about its training: stages, curves, zeros by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from sparsify.errors import RunError
from sparsify.files import JsonRecord
from sparsify.metadata import parse_json, text_lines
from sparsify.models.activations import activation_words
from sparsify.recipe.sparsification import UPCYCLINGS
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import checkpoint_names


class Stage(JsonRecord):
    """One model on the way, measured on the same text."""

    name: str
    loss: float
    """Nats per token."""
    zeros: float | None = None
    gate_zeros: float | None = None
    """Share of gate factors that are exactly zero; None where it was not measured."""


class TrajectoryPoint(JsonRecord):
    """One measurement during training; what was not measured at that moment is None."""

    tokens: int
    """Training tokens seen."""
    loss: float | None = None
    """Validation loss, nats per token."""
    zeros: float | None = None
    layers: list[float] | None = None
    """Share of zero products of every layer."""


class Trajectory(JsonRecord):
    """Training of the sparse model and, where there is one, of its dense baseline on the same tokens."""

    sparse: list[TrajectoryPoint]
    baseline: list[TrajectoryPoint] = Field(default_factory=list)


class _Line(BaseModel):
    """What is read of any line of a run; the others of its fields may be anything."""

    step: int = 0
    tokens: int = 0


class _TrainLine(_Line):
    loss: float | None = None
    tokens_per_second: float | None = None


class _ValidationLine(_Line):
    label: str
    loss: float | None
    zeros: float | None
    sources: dict[str, float | None]


class _GapLine(_Line):
    first_step: int
    last_step: int


class _LayersLine(_Line):
    label: str
    layers: list[float]


_LINES = {"train": _TrainLine, "validation": _ValidationLine, "gap": _GapLine}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none when it is not there yet. Fields of a run's lines are of their types.

    Half a line at the end is skipped: it is being written at this moment, or a killed run left it.

    Raises:
        RunError: If another line is not a JSON object, or a field of it has a wrong type.
    """
    if not path.exists():
        return []
    restore = "Restore the file from a copy of the run folder, or remove that line."
    lines = text_lines(path, RunError, "Restore the file from a copy of the run folder.")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as error:
            if number == len(lines):
                break
            raise RunError(
                f"Line {number} of {path} is not a JSON object: {line[:80]!r}.", next_step=restore
            ) from error
        try:
            _schema_of(record).model_validate(record)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RunError(
                f"Line {number} of {path} is not as it was written: {where[:80]}: {first['msg']}.", next_step=restore
            ) from error
        records.append(record)
    return records


def _schema_of(record: dict[str, Any]) -> type[_Line]:
    return _LayersLine if "layers" in record else _LINES.get(str(record.get("kind")), _Line)


def has_trained(run: RunFolder) -> bool:
    """Whether a run has trained a step, as its results or its metrics say. Raises RunError if its metrics.jsonl is damaged."""
    has_results = run.export.is_dir() or bool(checkpoint_names(run.checkpoints))
    return has_results or any(line.get("step") for line in read_lines(run.metrics))


def validation_records(run: RunFolder) -> list[dict[str, Any]]:
    """The validation lines of metrics.jsonl, in order."""
    return [record for record in read_lines(run.metrics) if record.get("kind") == "validation"]


ON_THE_WAY = ("blending", "soft routing")
"""Labels of validations of a model that is not yet what it is to become."""
TRAINING_LABELS = (*ON_THE_WAY, "training")


def curve_records(run: RunFolder) -> list[dict[str, Any]]:
    """The validation lines of the model that is trained: from where its training starts, without the base before an activation replacement.

    A blended run starts as its dense base: what the bare replacement would have made of it, no step ever met.
    """
    records = validation_records(run)
    labels = {record["label"] for record in records}
    start = "after_replacement" if "after_replacement" in labels and not is_blended(run) else "base"
    return [record for record in records if record["label"] in (*TRAINING_LABELS, start)]


def is_blended(run: RunFolder) -> bool:
    """Whether the run's activation is blended in while it trains."""
    return run.recipe.is_file() and run.load_recipe().blending.budget_share > 0


def stages(run: RunFolder) -> list[Stage]:
    """Dense base, right after the activation replacement, after training, and the baseline, as far as they were measured.

    Losses are validation losses: means over sources by token share, nats per token.
    """
    newest = _newest(run)
    if "training" in newest:
        for label in ON_THE_WAY:  # then, past now
            newest.pop(label, None)
    rows = [
        newest[label].model_copy(update={"name": name}) for label, name in _stage_names(run).items() if label in newest
    ]
    if baseline := _newest(run.baseline).get("training"):
        activation = run.baseline.load_recipe().activation.ffn_activation
        name = activation_words(activation, is_masked=run.baseline.is_masked)
        rows.append(baseline.model_copy(update={"name": f"{name} baseline, same tokens"}))
    return rows


def _newest(run: RunFolder) -> dict[str, Stage]:
    """The newest validation of every label."""
    gates = {(line["tokens"], line.get("label")): line.get("gate_zeros") for line in read_lines(run.sparsity)}
    return {
        record["label"]: Stage(
            name=record["label"],
            loss=record["loss"],
            zeros=record["zeros"],
            gate_zeros=gates.get((record["tokens"], record["label"])),
        )
        for record in validation_records(run)
    }


def trajectory(run: RunFolder) -> Trajectory:
    """Validation loss and zeros against tokens, for the run and its baseline."""
    return Trajectory(sparse=_points(run), baseline=_points(run.baseline))


def _stage_names(run: RunFolder) -> dict[str, str]:
    config = run.initial_config()
    if not config:
        return {}
    base = activation_words(config["base_ffn_activation"], is_masked=run.has_source_mask)
    replaced = "right after the activation replacement"
    if run.has_sparse_weights:
        replaced = "right after the conversion"
    elif is_blended(run):
        replaced = "what the bare replacement would be"
    elif run.recipe.is_file() and run.load_recipe().conversion.method in UPCYCLINGS:
        replaced = "right after upcycling"
    return {
        "base": f"{base} base",
        "after_replacement": replaced,
        "blending": "while blending",
        "soft routing": "while groups are soft",
        "training": "after training",
    }


def _points(run: RunFolder) -> list[TrajectoryPoint]:
    layers = {(line["tokens"], line["label"]): line["layers"] for line in read_lines(run.sparsity)}
    return [
        TrajectoryPoint(
            tokens=record["tokens"],
            loss=record["loss"],
            zeros=record["zeros"],
            layers=layers.get((record["tokens"], record["label"])),
        )
        for record in curve_records(run)
    ]
