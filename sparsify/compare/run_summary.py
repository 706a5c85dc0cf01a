"""Summary of a run folder for a comparison: recipe, data, validation losses, and the sequences they were computed on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from sparsify.compare.schema import ValidationPoint
from sparsify.conversion.weight_zeros import weight_sparsity
from sparsify.errors import RunError, nearest
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.mixture.sequences.shares import rounded_share
from sparsify.recipe.recipe import Recipe
from sparsify.runs.data import identity_of
from sparsify.runs.history import curve_records, read_lines
from sparsify.runs.run_folder import RunFolder


class Sequences(NamedTuple):
    """What determines the held-out sequences of a source: if it is equal, losses are on the same text.

    The amount of training data does not matter: the first held-out documents are used.
    """

    tokenizer_fingerprint: str
    fingerprint: str
    """Fingerprint of the source: text, columns, loss mask and held-out split."""
    sequence_length: int
    num_sequences: int


@dataclass(frozen=True)
class RunSummary:
    run: RunFolder
    recipe: Recipe
    lock: MixtureLock
    points: list[ValidationPoint]
    """At least one."""
    seen_tokens: int
    train_loss: float | None
    """Mean over the last tenth of its steps: the loss of a single step is mostly that of its batch."""
    tokens_per_second: float | None

    @property
    def budget_tokens(self) -> int:
        return self.recipe.num_steps * self.recipe.step_tokens

    @property
    def is_dense(self) -> bool:
        return self.run.is_dense

    @property
    def weight_sparsity(self) -> float | None:
        found = weight_sparsity(self.run.initial_config())
        return None if found is None else found.sparsity

    def sequences(self) -> dict[str, Sequences]:
        lock, wanted = self.lock, self.recipe.eval.validation_sequences_per_source
        return {
            name: Sequences(
                lock.tokenizer_fingerprint,
                source.fingerprint,
                lock.sequence_length,
                # Unknown while the source is being tokenised: assume that there are enough.
                wanted
                if source.held_out_tokens is None
                else min(wanted, source.held_out_tokens // lock.sequence_length),
            )
            for name, source in lock.sources.items()
            if name in self.points[-1].sources
        }

    def shares(self) -> dict[str, float]:
        return {name: rounded_share(source.token_share) for name, source in self.lock.sources.items()}

    def is_baseline_of(self, other: RunSummary) -> bool:
        """Whether this is the dense baseline of `other`: same model, tokens, order, optimiser and held-out sequences."""
        return (
            self.is_dense
            and not other.is_dense
            and identity_of(self.recipe, self.lock) == identity_of(other.recipe, other.lock)
            and self.sequences() == other.sequences()
        )


def read_run_summary(path: Path) -> RunSummary:
    """Reads a run folder.

    Raises:
        RunError: If it is not a run folder, is damaged, or has no validation loss yet.
        RecipeError: If its recipe is not one of this version.
    """
    run = RunFolder(path)
    if not path.is_dir():
        names = [folder.parent.name for folder in path.parent.glob("*/recipe.yaml")]
        raise RunError(
            f"There is no such run folder: {path}.",
            allowed=nearest(path.name, names) + "A folder that `sparsify train` wrote.",
            next_step="Check the spelling, and the folder that the command runs in.",
        )
    recipe = run.load_recipe()
    points = [_point(run, record) for record in curve_records(run)]
    if not points:
        raise RunError(
            f"{path} has no validation loss yet, so there is nothing to compare.",
            next_step="Wait for its first validation, or resume it with the command that started it.",
        )
    trained = [record for record in read_lines(run.metrics) if record.get("kind") == "train"]
    newest = trained[-1] if trained else {}
    losses = [record["loss"] for record in trained if record.get("loss") is not None]
    return RunSummary(
        run=run,
        recipe=recipe,
        lock=read_lock(run.mixture_lock),
        points=points,
        seen_tokens=max(newest.get("tokens", 0), points[-1].tokens),
        train_loss=fmean(losses[-math.ceil(len(losses) / 10) :]) if losses else None,
        tokens_per_second=newest.get("tokens_per_second"),
    )


def _point(run: RunFolder, record: dict[str, Any]) -> ValidationPoint:
    try:
        return ValidationPoint(
            tokens=record["tokens"],
            loss=record["loss"],
            # A source whose sequences have no label has no loss.
            sources={name: loss for name, loss in record["sources"].items() if loss is not None},
            zeros=record["zeros"],
        )
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{run.metrics} has a validation line of an unknown format: {record}.",
            next_step="Restore the file from a copy of the run folder, or remove that line.",
        ) from error
