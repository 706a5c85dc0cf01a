"""What a run says: metrics.jsonl and sparsity.jsonl always, a line for people, wandb when asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from sparsify.evaluation.results import EvaluationResults
from sparsify.files import write_text
from sparsify.recipe.recipe import Recipe
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState
from sparsify.sparsity.alarms import LayerAlarms
from sparsify.training.checkpoints import Saved
from sparsify.training.refits import RefitRecord
from sparsify.training.stability import BadStep
from sparsify.training.suite_results import task_figures
from sparsify.training.tracker import Tracker
from sparsify.training.validation import Validation

LINE_EVERY_SECONDS = 5.0
BAR_COLUMNS = 10
COMPACT_ABOVE = 100_000


class Telemetry:
    """Speaks for rank 0; the other ranks hold one that is silent.

    Args:
        recipe: The run's recipe.
        run: Its folder.
        first_step: Step that training goes on from; lines that a killed run wrote beyond it are removed.
        silent: Whether to write nothing at all.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, first_step: int, *, silent: bool) -> None:
        self._recipe, self._run, self._silent = recipe, run, silent
        self._budget_tokens = recipe.num_steps * recipe.step_tokens
        self._last_line = time.monotonic()
        self._zeros: float | None = None
        self._alarms = LayerAlarms()
        self._console = Console(highlight=False)
        self._progress: Progress | None = None
        self._tracker: Tracker | None = None
        if silent:
            return
        for path in (run.metrics, run.sparsity, run.samples):
            drop_lines_after(path, first_step)
        for record in read_lines(run.sparsity):
            self._check_layers(record["layers"], record["label"])  # said before the interruption
        if recipe.tracking.wandb != "disabled":
            self._tracker = Tracker(recipe, run)
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=BAR_COLUMNS))
            self._progress = Progress(*columns, console=self._console)
            self._progress.start()
            self._task = self._progress.add_task("", total=recipe.num_steps, completed=first_step)

    def train(
        self,
        step: int,
        seen_tokens: int,
        loss_sums: dict[str, float],
        num_labels: dict[str, int],
        **values: Any,
    ) -> None:
        """Records one finished training step.

        Args:
            step: Finished steps.
            seen_tokens: Training tokens seen.
            loss_sums: Cross-entropy of each source in this step, summed over its labels, in nats.
            num_labels: Labels of each source in this step.
            values: What else the line holds; what `Performance.step` measured is among it.
        """
        if self._silent:
            return
        loss = sum(loss_sums.values()) / max(sum(num_labels.values()), 1)
        values["sources"] = {
            source: loss_sums[source] / count for source, count in num_labels.items() if count
        }
        values["source_labels"] = num_labels
        now = time.monotonic()
        record = {"kind": "train", "step": step, "tokens": seen_tokens, "loss": loss, **values}
        self._append(self._run.metrics, record)
        line = progress_line(record, self._budget_tokens, record.get("zeros", self._zeros))
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=line)
        elif now - self._last_line >= LINE_EVERY_SECONDS or step == self._recipe.num_steps:
            self._last_line = now
            self._console.print(line, soft_wrap=True)

    def bad_step(self, bad: BadStep, seen_tokens: int, policy: str) -> None:
        """Records a step that did not go into the weights.

        Args:
            bad: What was wrong with it.
            seen_tokens: Training tokens seen, its own among them.
            policy: What the run does about it.
        """
        if self._silent:
            return
        record = {"kind": "bad_step", "step": bad.step, "tokens": seen_tokens}
        self._append(self._run.metrics, record | asdict(bad) | {"policy": policy})
        self.say(f"{bad.sentence()}; on_bad_step={policy}")

    def rolled_back(
        self, step: int, seen_tokens: int, to_step: int, sequences: tuple[int, int]
    ) -> None:
        """Records that weights and optimiser are again those of a checkpoint, and which sequences were left out by that."""
        if self._silent:
            return
        record = {"kind": "rollback", "step": step, "tokens": seen_tokens, "to_step": to_step}
        self._append(self._run.metrics, record | {"sequences": sequences})
        self.say(
            f"rolled back to the weights of step {to_step:,}; sequences {sequences[0]}–{sequences[1]} are left out"
        )

    def refit(self, step: int, seen_tokens: int, refitted: RefitRecord, seconds: float) -> None:
        """Records a milestone of the blending.

        Args:
            step: The step that it precedes, so that what is trained again from before it is recorded once.
            seen_tokens: Training tokens seen.
            refitted: What came of it.
            seconds: How long training stood still for it.
        """
        if self._silent:
            return
        record = {"kind": "refit", "step": step, "tokens": seen_tokens, **asdict(refitted)}
        self._append(self._run.metrics, record | {"seconds": round(seconds, 3)})
        errors = [
            "unknown" if error is None else f"{error:.3f}"
            for error in (refitted.error_before, refitted.error_after)
        ]
        line = f"refit, {refitted.blended_share:.0%} of the way: relative error {errors[0]} before, {errors[1]} after"
        line += f"; {refitted.num_flipped:,} signs turned" if refitted.num_flipped else ""
        for one in refitted.kept:
            expert = "" if one["expert"] is None else f", expert {one['expert']}"
            line += f"; layer {one['layer']}{expert} keeps its weights: {one['because']}"
        self.say(f"{line} ({seconds:.1f} s)")

    def underused(self, step: int, seen_tokens: int, layer: int, expert: int, load: float) -> None:
        """Raises the alarm for an expert that has been underused.

        Args:
            step: Finished steps.
            seen_tokens: Training tokens seen.
            layer: Its layer, from 0.
            expert: Its number in the layer, from 0.
            load: Share of the layer's routed tokens that it got in this step.
        """
        if self._silent:
            return
        steps = self._recipe.stability.underused_expert_steps
        record = {"kind": "underused_expert", "step": step, "tokens": seen_tokens, "steps": steps}
        self._append(self._run.metrics, record | {"layer": layer, "expert": expert, "load": load})
        self.say(
            f"expert {expert} of layer {layer} starves at step {step:,}: {load:.2%} of its layer's tokens, too few for "
            f"{steps} steps in a row; a higher training.router_aux_loss_coefficient spreads them more evenly"
        )

    def validation(
        self,
        step: int,
        seen_tokens: int,
        result: Validation,
        label: str,
        blended_share: float | None = None,
    ) -> None:
        """Records one validation pass.

        Args:
            step: Finished steps.
            seen_tokens: Training tokens seen.
            result: What the pass found.
            label: `base`, `after_replacement`, `blending` or `training`: which activation was measured.
            blended_share: How much of the sparse activation was in force while blending.
        """
        if self._silent:
            return
        summary = result.statistics.summary()
        self._zeros = result.statistics.zero_share("product")
        where: dict[str, Any] = {"step": step, "tokens": seen_tokens, "label": label}
        if blended_share is not None:
            where["blended_share"] = blended_share
        losses = {"loss": result.loss, "sources": result.losses, "zeros": self._zeros}
        losses["source_zeros"] = result.zeros
        self._append(self._run.metrics, {"kind": "validation", **where, **losses})
        alarms = self._check_layers(result.statistics.layer_zero_shares(), label)
        self._append(self._run.sparsity, where | summary | {"alarms": alarms})
        parts = "  ".join(f"{name} {loss:.3f}" for name, loss in result.losses.items())
        what = label.replace("_", " ")
        what += "" if blended_share is None else f" ({blended_share:.0%} of the way)"
        self.say(f"validation {what}: loss {result.loss:.3f}  ({parts})  zeros {self._zeros:.1%}")
        if self._tracker is not None:
            layers = [record["layers"] for record in read_lines(self._run.sparsity)]
            self._tracker.heat_map(step, layers)
        for alarm in alarms:
            self.say(f"[bold red]Alarm[/bold red] {alarm}")

    def _check_layers(self, layers: list[float], label: str) -> list[str]:
        # A mixture with the dense activation has no zeros, and is about to have them again.
        return [] if label == "blending" else self._alarms.check(layers)

    def samples(self, step: int, seen_tokens: int, prompts: list[str], texts: list[str]) -> None:
        """Records what the model makes of the prompts at a checkpoint."""
        if self._silent:
            return
        pairs = [
            {"prompt": prompt, "continuation": text}
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        record = {"step": step, "tokens": seen_tokens, "samples": pairs}
        with self._run.samples.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            self._tracker.samples(step, pairs)

    def suite(
        self,
        step: int,
        seen_tokens: int,
        results: EvaluationResults,
        folder: str,
        seconds: float,
    ) -> None:
        """Records what a suite found.

        Args:
            step: Finished steps.
            seen_tokens: Training tokens seen.
            results: The scores.
            folder: Where all of them stand, from the run folder on.
            seconds: How long training stood still for it.
        """
        if self._silent:
            return
        record = {"kind": "suite", "step": step, "tokens": seen_tokens, "suite": results.suite}
        record |= {"tasks": task_figures(results), "folder": folder, "seconds": round(seconds, 3)}
        self._append(self._run.metrics, record)
        parts = "  ".join(f"{task.name} {task.score.value:.3f}" for task in results.tasks)
        self.say(f"suite {results.suite}: {parts}  ({seconds:.1f} s)")

    def base(self, stage: Mapping[str, Any], shares: Mapping[str, float]) -> None:
        """Records the validation losses of the dense base that a calibration measured, before step 1.

        Args:
            stage: Its `losses` by source and share of `zeros`.
            shares: Token share of each source.
        """
        if self._silent:
            return
        losses: dict[str, float] = stage["losses"]
        weights = {source: shares.get(source, 0.0) for source in losses}
        loss = sum(weights[name] * value for name, value in losses.items()) / sum(weights.values())
        record = {"kind": "validation", "step": 0, "tokens": 0, "label": "base", "loss": loss}
        record |= {"sources": losses, "zeros": stage["zeros"], "source_zeros": {}}
        self._append(self._run.metrics, record)
        self.say(f"validation base: loss {loss:.3f}, as calibration measured it")

    def saved(self, state: TrainingState, saved: Saved, seconds: float) -> None:
        """Records that a checkpoint is on disk, its size, and how long training stood still for it."""
        if self._silent:
            return
        where = {"kind": "checkpoint", "step": state.step, "tokens": state.seen_tokens}
        cost = {"bytes": saved.size_bytes, "seconds": round(seconds, 3)}
        self._append(self._run.metrics, where | cost)
        self.say(f"saved {saved.path} ({saved.size_bytes / 1e6:.0f} MB, {seconds:.1f} s)")

    def close(self) -> None:
        """Ends the progress bar and the tracker."""
        if self._progress is not None:
            self._progress.stop()
        if self._tracker is not None:
            self._tracker.close()

    def say(self, line: str) -> None:
        """Prints a line for people."""
        if not self._silent:
            (self._progress.console if self._progress else self._console).print(
                line, soft_wrap=True
            )

    def _append(self, path: Path, record: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if self._tracker is not None:
            self._tracker.numbers(record)


def progress_line(record: dict[str, Any], budget_tokens: int, zeros: float | None) -> str:
    """A train record for people: with the bar beside it at most 120 columns.

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
        f"{record['flops_per_second'] / 1e9:,.0f} GFLOP/s"
        if record["mfu"] is None
        else f"MFU {record['mfu']:.1%}",
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
    """All digits, or above a hundred thousand four of them and a unit: 3,026, 204.8K, 150B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= max(size, COMPACT_ABOVE):
            return f"{number / size:.4g}{unit}"
    return f"{number:,}"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
