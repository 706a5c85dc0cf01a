"""The records of a run: metrics.jsonl, sparsity.jsonl and samples.jsonl, a progress line, alarms, and a tracker where it is set."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

from sparsify.errors import RunError
from sparsify.files import write_text
from sparsify.metadata import parse_json, text_lines
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.log_lines import console
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.training.tracker import Tracker

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
        loss: Mean of the sources' losses, weighted by their token shares. Nats per token; None if nothing has a label.
        losses: Loss of each source of the mixture, those without a share among them. Nats per token; None without a label.
        zeros: Share of exact zeros of each source.
        statistics: Which neurons fired on all these sequences.
    """

    loss: float | None
    losses: dict[str, float | None]
    zeros: dict[str, float]
    statistics: ActivationStatistics


DEAD_ZEROS = 0.999
"""A layer with more zeros than this adds almost nothing to the residual stream."""
DENSIFIED_BY = 0.10
"""Absolute drop of a layer's share of zeros below its maximum at which it counts as densifying."""


class LayerAlarms:
    """Checks the zeros of every layer at each measurement. An alarm is repeated only after the layer has recovered."""

    def __init__(self) -> None:
        self._highest: dict[int, float] = {}
        self._raised: set[tuple[int, str]] = set()

    def check(self, layers: Sequence[float]) -> list[str]:
        """Checks one measurement.

        Returns:
            The new alarms, one sentence each.
        """
        alarms = []
        for layer, zeros in enumerate(layers):
            if math.isnan(zeros):
                continue
            highest = max(self._highest.get(layer, 0.0), zeros)
            self._highest[layer] = highest
            states = {
                "dies": (
                    zeros > DEAD_ZEROS,
                    f"layer {layer} dies: {zeros:.2%} of its activations are zero",
                ),
                "densifies": (
                    highest - zeros > DENSIFIED_BY,
                    f"layer {layer} densifies: {zeros:.1%} zeros, down from {highest:.1%}",
                ),
            }
            for state, (holds, sentence) in states.items():
                if holds and (layer, state) not in self._raised:
                    alarms.append(sentence)
                    self._raised.add((layer, state))
                elif not holds:
                    self._raised.discard((layer, state))
        return alarms


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
        self._note_gaps(first_step)
        for record in read_lines(run.sparsity):
            self._check_layers(record["layers"], record["label"])  # said before the interruption
        if recipe.tracking.wandb != "disabled":
            self._tracker = Tracker(recipe, run)
        if console.is_terminal:
            columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=BAR_COLUMNS))
            self._progress = Progress(*columns, console=console)
            self._progress.start()
            self._task = self._progress.add_task("", total=recipe.num_steps, completed=first_step)

    def _note_gaps(self, first_step: int) -> None:
        """Says in the log and in metrics.jsonl which finished steps have no line: the file was cut off or edited."""
        for first, last in missing_steps(read_lines(self._run.metrics), first_step):
            message = f"{self._run.metrics} has no lines of steps {first:,} to {last:,}, which are in the weights."
            logger.warning(message)
            fields = {"kind": "gap", "step": first_step, "tokens": first_step * self._recipe.step_tokens}
            self._append(self._run.metrics, fields | {"first_step": first, "last_step": last})

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
        labels = sum(num_labels.values())
        loss = sum(loss_sums.values()) / labels if labels else None
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
        losses["site_zeros"] = sites = result.statistics.site_zero_shares()
        self._append(self._run.metrics, {"kind": "validation", **where, **losses})
        alarms = self._check_layers(result.statistics.layer_zero_shares(), label)
        self._append(self._run.sparsity, where | summary | {"alarms": alarms})
        parts = "  ".join(f"{name} {loss_words(loss)}" for name, loss in result.losses.items())
        masked = "".join(f"  {site} {zeros:.1%}" for site, zeros in sites.items())
        what = label.replace("_", " ")
        for name, value in fields.items():
            what += f", {name.replace('_', ' ')} {value:.2f}"
        logger.info(f"validation {what}: loss {loss_words(result.loss)}  ({parts})  zeros {self._zeros:.1%}{masked}")
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


def loss_words(loss: float | None) -> str:
    return "no labels" if loss is None else f"{loss:.3f}"


def progress_line(record: dict[str, Any], budget_tokens: int, zeros: float | None) -> str:
    """A train record for people: at most 120 columns with the bar.

    Args:
        record: A line of metrics.jsonl with what `Performance.step` gives.
        budget_tokens: Training tokens of the run.
        zeros: Share of exact zeros in this step where they are counted, else at the last validation.
    """
    parts = [
        f"{record['tokens'] / budget_tokens:4.0%} of {_compact(budget_tokens)} tokens",
        f"loss {loss_words(record['loss'])}",
        "" if zeros is None else f"zeros {zeros:.1%}",
        f"{_compact(round(record['tokens_per_second']))} tokens/s",
        f"{record['flops_per_second'] / 1e9:,.0f} GFLOP/s" if record["mfu"] is None else f"MFU {record['mfu']:.1%}",
        f"data {record['data_share']:.0%}",
        f"{record['memory_bytes'] / 1e9:.1f} GB",
        f"{_duration(record['left_seconds'])} left",
    ]
    return "  ".join(part for part in parts if part)


def missing_steps(records: Iterable[dict[str, Any]], last_step: int) -> list[tuple[int, int]]:
    """First and last of each range of steps, from 1 to `last_step`, of which neither a line nor a noted gap tells."""
    told = np.zeros(last_step + 2, dtype=np.bool_)
    told[[0, -1]] = True
    for record in records:
        first = last = record["step"]
        if record.get("kind") == "gap":
            first, last = record["first_step"], record["last_step"]
        elif record.get("kind") not in ("train", "bad_step"):
            continue
        told[min(max(first, 0), last_step + 1) : min(last, last_step) + 1] = True
    changes = np.flatnonzero(np.diff(told.astype(np.int8)))
    return [(int(start) + 1, int(stop)) for start, stop in changes.reshape(-1, 2)]


def drop_lines_after(path: Path, step: int) -> None:
    """Removes the lines of a JSON-lines file that belong to later steps, and a last line that was cut off."""
    if not path.is_file():
        return
    kept = []
    for line in text_lines(path, RunError):
        try:
            written = parse_json(line)["step"]
        except (ValueError, TypeError, KeyError):
            continue
        if written < step or (written == step and step > 0):
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
