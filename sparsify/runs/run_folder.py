"""The run folder: where each stage finds what the stage before it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import RunError
from sparsify.recipe.compose import load_recipe
from sparsify.recipe.recipe import Recipe

POLL_SECONDS = 0.1
"""How often a process looks whether another one has written or ended."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run. Nothing is created by naming it."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def mixture_lock(self) -> Path:
        return self.path / "mixture.lock.json"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def initial(self) -> Path:
        """The converted checkpoint that training starts from."""
        return self.path / "initial"

    @property
    def teacher(self) -> Path:
        """The dense source, where distillation learns from it and `initial` has no longer its weights."""
        return self.path / "teacher"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def sparsity(self) -> Path:
        return self.path / "sparsity.jsonl"

    @property
    def samples(self) -> Path:
        """What the model writes at each checkpoint."""
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def baseline(self) -> RunFolder:
        """The baseline's own run folder."""
        return RunFolder(self.path / "baseline")

    def load_recipe(self) -> Recipe:
        """The recipe as it was resolved when the run was launched.

        Raises:
            RunError: If this is not a run folder.
        """
        if not self.recipe.is_file():
            raise RunError(
                f"{self.path} is not a run folder: it has no recipe.yaml.",
                next_step="Give the folder that `sparsify train` printed, such as runs/quickstart.",
            )
        return load_recipe(self.recipe)
