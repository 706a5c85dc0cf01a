"""What a run folder says about one variant of a comparison, and on which sequences its losses rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.compare.schema import Point
from sparsify.errors import RunError, nearest
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.recipe.recipe import Recipe
from sparsify.runs.history import curve_records, read_lines
from sparsify.runs.identity import identity_of, rounded_share
from sparsify.runs.run_folder import RunFolder


class Sequences(NamedTuple):
    """Everything that the held-out sequences of a source follow from: where it is equal, losses are of the same text.

    How much of the source a run trains on does not matter: its first held-out documents are measured.
    """

    tokenizer_fingerprint: str
    fingerprint: str
    """Of the source: its text, columns, loss mask and held-out split."""
    sequence_length: int
    num_sequences: int


@dataclass(frozen=True)
class Variant:
    """One run folder: a run or a baseline."""

    run: RunFolder
    recipe: Recipe
    lock: MixtureLock
    points: list[Point]
    """At least one."""
    seen_tokens: int
    tokens_per_second: float | None

    @property
    def budget_tokens(self) -> int:
        """Tokens of all its steps."""
        return self.recipe.num_steps * self.recipe.step_tokens

    @property
    def is_dense(self) -> bool:
        """Whether it may be a dense baseline."""
        return self.recipe.is_dense

    def sequences(self) -> dict[str, Sequences]:
        """The sequences of every source that was measured."""
        lock, wanted = self.lock, self.recipe.eval.validation_sequences_per_source
        return {
            name: Sequences(
                lock.tokenizer_fingerprint,
                source.fingerprint,
                lock.sequence_length,
                # Not known yet while the source is being tokenised: then it has as many as are wanted.
                wanted
                if source.held_out_tokens is None
                else min(wanted, source.held_out_tokens // lock.sequence_length),
            )
            for name, source in lock.sources.items()
            if name in self.points[-1].sources
        }

    def shares(self) -> dict[str, float]:
        """Planned share of tokens of every source."""
        return {
            name: rounded_share(source.token_share) for name, source in self.lock.sources.items()
        }

    def is_control_of(self, other: Variant) -> bool:
        """Whether it is `other` with the activation left dense: model, tokens, order, optimiser and sequences are the same."""
        return (
            self.is_dense
            and not other.is_dense
            and identity_of(self.recipe, self.lock) == identity_of(other.recipe, other.lock)
            and self.sequences() == other.sequences()
        )


def read_variant(path: Path) -> Variant:
    """Reads a run folder.

    Raises:
        RunError: If it is no run folder, is damaged, or was not measured yet.
        RecipeError: If its recipe is not one of this version.
    """
    run = RunFolder(path)
    if not path.is_dir():
        names = [folder.parent.name for folder in path.parent.glob("*/recipe.yaml")]
        raise RunError(
            f"There is no run folder {path}.",
            allowed=nearest(path.name, names) + "A folder that `sparsify train` wrote.",
            next_step="Check the spelling, and the folder that the command runs in.",
        )
    recipe = run.load_recipe()
    points = [_point(run, record) for record in curve_records(run)]
    if not points:
        raise RunError(
            f"{path} has no validation loss yet: nothing in it can be compared.",
            next_step="Wait until it was measured for the first time, or start it again with the command that began it.",
        )
    trained = [record for record in read_lines(run.metrics) if record.get("kind") == "train"]
    newest = trained[-1] if trained else {}
    return Variant(
        run=run,
        recipe=recipe,
        lock=read_lock(run.mixture_lock),
        points=points,
        seen_tokens=max(newest.get("tokens", 0), points[-1].tokens),
        tokens_per_second=newest.get("tokens_per_second"),
    )


def _point(run: RunFolder, record: dict[str, Any]) -> Point:
    try:
        return Point(
            tokens=record["tokens"],
            loss=record["loss"],
            sources=record["sources"],
            zeros=record["zeros"],
        )
    except (KeyError, ValueError) as error:
        raise RunError(
            f"{run.metrics} has a validation line that this version did not write: {record}.",
            next_step="Restore the file from a copy of the run folder, or remove that line.",
        ) from error
