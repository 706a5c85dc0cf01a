"""What a run's JSON lines say about its way: stages, curves, zeros by layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sparsify.sparsity.schema import Stage, Trajectory, TrajectoryPoint
from sparsify.training.run_folder import RunFolder


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON-lines file; none when it is not there yet."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def validation_records(run: RunFolder) -> list[dict[str, Any]]:
    """The validation lines of metrics.jsonl, in order."""
    return [record for record in read_lines(run.metrics) if record["kind"] == "validation"]


def stages(run: RunFolder) -> list[Stage]:
    """Dense base, right after the swap, after training, and the control, as far as they were measured.

    Losses are validation losses: means over sources by token share, nats per token.
    """
    newest = {record["label"]: record for record in validation_records(run)}
    rows = [
        Stage(name=name, loss=newest[label]["loss"], zeros=newest[label]["zeros"])
        for label, name in _stage_names(run).items()
        if label in newest
    ]
    control = [
        record for record in validation_records(run.control) if record["label"] == "training"
    ]
    if control:
        activation = run.control.load_recipe().activation.ffn_activation
        name = "dense control" if activation == "swiglu" else f"{activation} control"
        rows.append(
            Stage(name=f"{name}, same tokens", loss=control[-1]["loss"], zeros=control[-1]["zeros"])
        )
    return rows


def trajectory(run: RunFolder) -> Trajectory:
    """Validation loss and zeros against tokens, for the run and its control."""
    return Trajectory(sparse=_points(run), control=_points(run.control))


def _stage_names(run: RunFolder) -> dict[str, str]:
    if not run.initial.is_dir():
        return {}
    config = json.loads((run.initial / "config.json").read_text(encoding="utf-8"))
    base = config["base_ffn_activation"]
    return {
        "base": "dense base" if base == "swiglu" else f"{base} base",
        "after_swap": "right after the swap",
        "training": "after training",
    }


def _points(run: RunFolder) -> list[TrajectoryPoint]:
    records = validation_records(run)
    start = "after_swap" if any(record["label"] == "after_swap" for record in records) else "base"
    layers = {(line["tokens"], line["label"]): line["layers"] for line in read_lines(run.sparsity)}
    return [
        TrajectoryPoint(
            tokens=record["tokens"],
            loss=record["loss"],
            zeros=record["zeros"],
            layers=layers.get((record["tokens"], record["label"])),
        )
        for record in records
        if record["label"] in ("training", start)
    ]
