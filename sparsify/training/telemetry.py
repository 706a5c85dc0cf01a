"""The records of a run: metrics.jsonl, sparsity.jsonl and samples.jsonl, a progress line, and wandb where it is set.

What wandb gets of a run: every number of its lines, its samples, and a picture of the zeros.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, Progress, TextColumn

from sparsify.files import write_text
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.log_lines import console
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.alarms import LayerAlarms
from sparsify.sparsity.statistics import ActivationStatistics

CELL_PIXELS = 12


class Tracker:
    """A wandb run; offline unless `tracking.wandb=online`."""

    def __init__(self, recipe: Recipe, run: RunFolder) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # takes a second, which runs without it need not wait for

        self._wandb = wandb
        self._run = wandb.init(
            project=recipe.tracking.wandb_project,
            name=recipe.name,
            dir=str(run.path),
            mode=recipe.tracking.wandb,  # pyright: ignore[reportArgumentType]  (validated by recipe.py)
            config=asdict(recipe),
        )

    def numbers(self, record: dict[str, Any]) -> None:
        self._run.log(dict(_numbers(record, str(record.get("kind", "sparsity")))), step=record["step"])

    def samples(self, step: int, pairs: list[dict[str, str]]) -> None:
        rows: list[Any] = [[step, pair["prompt"], pair["continuation"]] for pair in pairs]
        table = self._wandb.Table(columns=["step", "prompt", "continuation"], data=rows)
        self._run.log({"samples": table}, step=step)

    def heat_map(self, step: int, layers: list[list[float]]) -> None:
        caption = "share of zeros: layers from top to bottom, validations from left to right"
        image = self._wandb.Image(heat_map(layers), caption=caption)
        self._run.log({"sparsity/heat_map": image}, step=step)

    def close(self) -> None:
        self._run.finish()


def heat_map(layers: list[list[float]]) -> NDArray[np.uint8]:
    """Share of zeros of every layer (rows) at every validation (columns) as a picture, white at 0 and dark at 1.

    Returns:
        Grey levels, with `CELL_PIXELS` a cell each way. [layers * cell, validations * cell]
    """
    grey = np.round(255 * (1 - np.array(layers).T)).astype(np.uint8)
    return np.kron(grey, np.ones((CELL_PIXELS, CELL_PIXELS), np.uint8))


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _numbers(item, f"{name}/{key}")


logger = logging.getLogger(__name__)

LINE_EVERY_SECONDS = 5.0
BAR_COLUMNS = 10
COMPACT_ABOVE = 100_000
FINAL_LABELS = ("base", "after_replacement", "training")
"""Validations of a model as it is saved."""


@dataclass(frozen=True)
class Validation:
    """What one validation pass found.

    Attributes:
        loss: Mean of the sources' losses, weighted by their token shares. Nats per token.
        losses: Loss of each source of the mixture, those without a share among them. Nats per token.
        zeros: Share of exact zeros of each source.
        statistics: Which neurons fired on all these sequences.
    """

    loss: float
    losses: dict[str, float]
    zeros: dict[str, float]
    statistics: ActivationStatistics


class Telemetry:
    """Records nothing: what every rank but the first holds."""

    def record(self, kind: str, step: int, tokens: int, message: str = "", **fields: Any) -> None:
        """Adds a line to metrics.jsonl.

        Args:
            kind: What the line says.
            step: Finished steps, or the step that it precedes.
            tokens: Training tokens seen.
            message: The same as a sentence for the log; "" for none.
            fields: What else the line holds.
        """

    def train(
        self,
        step: int,
        tokens: int,
        loss_sums: dict[str, float],
        num_labels: dict[str, int],
        **values: Any,
    ) -> None:
        """Records one finished training step.

        Args:
            step: Finished steps.
            tokens: Training tokens seen.
            loss_sums: Cross-entropy of each source in this step, summed over its labels, in nats.
            num_labels: Labels of each source in this step.
            values: What else the line holds; what `Performance.step` measured is among it.
        """

    def validation(self, step: int, tokens: int, result: Validation, label: str, **fields: Any) -> None:
        """Records one validation pass.

        Args:
            step: Finished steps.
            tokens: Training tokens seen.
            result: What the pass found.
            label: Which model was measured: one of FINAL_LABELS, or what an objective calls the model on its way there.
            fields: What else the lines hold.
        """

    def samples(self, step: int, tokens: int, prompts: list[str], texts: list[str]) -> None:
        """Records the continuations of the prompts at a checkpoint."""

    def close(self) -> None:
        """Ends the progress bar and the tracker."""


class RunTelemetry(Telemetry):
    """Writes the files of a run; the first rank holds it.

    Args:
        recipe: The run's recipe.
        run: Its folder.
        first_step: Step that training resumes from; lines that a killed run wrote beyond it are removed.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, first_step: int) -> None:
        self._recipe, self._run = recipe, run
        self._budget_tokens = recipe.num_steps * recipe.step_tokens
        self._last_line = time.monotonic()
        self._zeros: float | None = None
        self._alarms = LayerAlarms()
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        for path in (run.metrics, run.sparsity, run.samples):
            drop_lines_after(path, first_step)
        for record in read_lines(run.sparsity):
            self._check_layers(record["layers"], record["label"])  # said before the interruption
        if recipe.tracking.wandb != "disabled":
            self._tracker = Tracker(recipe, run)
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=BAR_COLUMNS))
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task = self._progress.add_task("", total=recipe.num_steps, completed=first_step)

    def record(self, kind: str, step: int, tokens: int, message: str = "", **fields: Any) -> None:
        line = {"kind": kind, "step": step, "tokens": tokens}
        self._append(self._run.metrics, line | fields)
        if message:
            logger.info(message)

    def train(
        self,
        step: int,
        tokens: int,
        loss_sums: dict[str, float],
        num_labels: dict[str, int],
        **values: Any,
    ) -> None:
        loss = sum(loss_sums.values()) / max(sum(num_labels.values()), 1)
        values["sources"] = {source: loss_sums[source] / count for source, count in num_labels.items() if count}
        values["source_labels"] = num_labels
        now = time.monotonic()
        record = {"kind": "train", "step": step, "tokens": tokens, "loss": loss, **values}
        self._append(self._run.metrics, record)
        line = progress_line(record, self._budget_tokens, record.get("zeros", self._zeros))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=line)
        elif now - self._last_line >= LINE_EVERY_SECONDS or step == self._recipe.num_steps:
            self._last_line = now
            logger.info(line)

    def validation(self, step: int, tokens: int, result: Validation, label: str, **fields: Any) -> None:
        summary = result.statistics.summary()
        self._zeros = result.statistics.zero_share("product")
        where: dict[str, Any] = {"step": step, "tokens": tokens, "label": label, **fields}
        losses = {"loss": result.loss, "sources": result.losses, "zeros": self._zeros}
        losses["source_zeros"] = result.zeros
        self._append(self._run.metrics, {"kind": "validation", **where, **losses})
        alarms = self._check_layers(result.statistics.layer_zero_shares(), label)
        self._append(self._run.sparsity, where | summary | {"alarms": alarms})
        parts = "  ".join(f"{name} {loss:.3f}" for name, loss in result.losses.items())
        what = label.replace("_", " ")
        for name, value in fields.items():
            what += f", {name.replace('_', ' ')} {value:.2f}"
        logger.info(f"validation {what}: loss {result.loss:.3f}  ({parts})  zeros {self._zeros:.1%}")
        if self._tracker is not None:
            layers = [record["layers"] for record in read_lines(self._run.sparsity)]
            self._tracker.heat_map(step, layers)
        for alarm in alarms:
            logger.warning(f"Alarm {alarm}")

    def samples(self, step: int, tokens: int, prompts: list[str], texts: list[str]) -> None:
        pairs = [{"prompt": prompt, "continuation": text} for prompt, text in zip(prompts, texts, strict=True)]
        record = {"step": step, "tokens": tokens, "samples": pairs}
        with self._run.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            self._tracker.samples(step, pairs)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tracker is not None:
            self._tracker.close()

    def _check_layers(self, layers: list[float], label: str) -> list[str]:
        # A model on its way may have no zeros yet, and is about to have them.
        return self._alarms.check(layers) if label in FINAL_LABELS else []

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            self._tracker.numbers(record)


def progress_line(record: dict[str, Any], budget_tokens: int, zeros: float | None) -> str:
    """A train record for people: at most 120 columns with the bar.

    Args:
        record: A line of metrics.jsonl with what `Performance.step` gives.
        budget_tokens: Training tokens of the run.
        zeros: Share of exact zeros in this step where they are counted, else at the last validation.
    """
    parts = [
        f"{record['tokens'] / budget_tokens:4.0%} of {_compact(budget_tokens)} tokens",
        f"loss {record['loss']:.3f}",
        "" if zeros is None else f"zeros {zeros:.1%}",
        f"{_compact(round(record['tokens_per_second']))} tokens/s",
        f"{record['flops_per_second'] / 1e9:,.0f} GFLOP/s" if record["mfu"] is None else f"MFU {record['mfu']:.1%}",
        f"data {record['data_share']:.0%}",
        f"{record['memory_bytes'] / 1e9:.1f} GB",
        f"{_duration(record['left_seconds'])} left",
    ]
    return "  ".join(part for part in parts if part)


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of a JSON-lines file that belong to later steps, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["step"] < step or (record["step"] == step and step > 0):
            kept.append(line)
    write_text(path, "".join(line + "\n" for line in kept))


def _compact(number: int) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= max(size, COMPACT_ABOVE):
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
