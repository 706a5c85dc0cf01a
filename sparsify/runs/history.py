"""What a run's JSON lines say about its training: stages, curves, zeros by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sparsify.errors import RunError
from sparsify.models.activations import is_dense
from sparsify.runs.run_folder import RunFolder


class _Section(BaseModel):
    # A diverged model has a loss of NaN or infinity; JSON has neither, and null would mean "not measured".
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Stage(_Section):
    """One model on the way, measured on the same text."""

    name: str
    loss: float
    """Nats per token."""
    zeros: float | None = None


class TrajectoryPoint(_Section):
    """One measurement during training; what was not measured at that moment is None."""

    tokens: int
    """Training tokens seen."""
    loss: float | None = None
    """Validation loss, nats per token."""
    zeros: float | None = None
    layers: list[float] | None = None
    """Share of zero products of every layer."""


class Trajectory(_Section):
    """Training of the sparse model and, where there is one, of its dense baseline on the same tokens."""

    sparse: list[TrajectoryPoint]
    baseline: list[TrajectoryPoint] = Field(default_factory=list)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none when it is not there yet.

    Half a line at the end is skipped: it is being written at this moment, or a killed run left it.

    Raises:
        RunError: If another line is not a JSON object.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    records = [_record(line) for line in lines]
    if records[-1] is None:
        del records[-1]
    if None in records:
        number = records.index(None)
        raise RunError(
            f"Line {number + 1} of {path} is not a JSON object: {lines[number][:80]!r}.",
            next_step="Restore the file from a copy of the run folder, or remove that line.",
        )
    return [record for record in records if record is not None]


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def validation_records(run: RunFolder) -> list[dict[str, Any]]:
    """The validation lines of metrics.jsonl, in order."""
    return [record for record in read_lines(run.metrics) if record.get("kind") == "validation"]


def curve_records(run: RunFolder) -> list[dict[str, Any]]:
    """The validation lines of the model that is trained: from where its training starts, without the base before an activation replacement.

    A blended run starts as its dense base: what the bare replacement would have made of it, no step ever met.
    """
    records = validation_records(run)
    labels = {record["label"] for record in records}
    start = "after_replacement" if "after_replacement" in labels and not is_blended(run) else "base"
    return [record for record in records if record["label"] in ("blending", "training", start)]


def is_blended(run: RunFolder) -> bool:
    """Whether the run's activation is blended in while it trains."""
    return run.recipe.is_file() and run.load_recipe().blending.budget_share > 0


def stages(run: RunFolder) -> list[Stage]:
    """Dense base, right after the activation replacement, after training, and the baseline, as far as they were measured.

    Losses are validation losses: means over sources by token share, nats per token.
    """
    newest = {record["label"]: record for record in validation_records(run)}
    if "training" in newest:
        newest.pop("blending", None)  # on its way then, past now
    rows = [
        Stage(name=name, loss=newest[label]["loss"], zeros=newest[label]["zeros"])
        for label, name in _stage_names(run).items()
        if label in newest
    ]
    baseline = [record for record in validation_records(run.baseline) if record["label"] == "training"]
    if baseline:
        recipe = run.baseline.load_recipe()
        name = f"{'dense' if recipe.is_dense else recipe.activation.ffn_activation} baseline"
        rows.append(Stage(name=f"{name}, same tokens", loss=baseline[-1]["loss"], zeros=baseline[-1]["zeros"]))
    return rows


def trajectory(run: RunFolder) -> Trajectory:
    """Validation loss and zeros against tokens, for the run and its baseline."""
    return Trajectory(sparse=_points(run), baseline=_points(run.baseline))


def _stage_names(run: RunFolder) -> dict[str, str]:
    if not run.initial.is_dir():
        return {}
    config = json.loads((run.initial / "config.json").read_text(encoding="utf-8"))
    base = config["base_ffn_activation"]
    return {
        "base": f"{'dense' if is_dense(base) else base} base",
        "after_replacement": "what the bare replacement would be"
        if is_blended(run)
        else "right after the activation replacement",
        "blending": "while blending",
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
