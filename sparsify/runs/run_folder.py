"""The run folder: where each stage finds what the stage before it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsify.errors import RunError
from sparsify.metadata import read_json
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
    def decoding(self) -> Path:
        """How fast the export decodes on the machine that trained it."""
        return self.path / "decoding.json"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def baseline(self) -> RunFolder:
        """The baseline's own run folder."""
        return RunFolder(self.path / "baseline")

    @property
    def is_ours(self) -> bool:
        """Whether `sparsify train` wrote this folder, as one of two files shows that are not in anybody else's."""
        for path, key in ((self.environment, "packages"), (self.mixture_lock, "tokenizer_fingerprint")):
            try:
                if path.is_file() and key in read_json(path, RunError):
                    return True
            except RunError:  # damaged; the other one may tell
                continue
        return False

    @property
    def is_dense(self) -> bool:
        """Whether the model that is trained makes no exact zeros and has no sparse weights.

        Raises:
            RunError: If this is not a run folder.
        """
        return self.load_recipe().is_dense and not self.is_masked and not self.has_sparse_weights

    @property
    def is_masked(self) -> bool:
        """Whether the checkpoint that training starts from stores a mask; False before there is one."""
        return bool(self.initial_config().get("sparsification"))

    @property
    def has_sparse_weights(self) -> bool:
        """Whether the checkpoint that training starts from has weights that were set to zero; False before there is one."""
        return bool(self.initial_config().get("weight_sparsity"))

    @property
    def has_source_mask(self) -> bool:
        """Whether that mask is the source's own, and not of the run's conversion."""
        return self.is_masked and not self.load_recipe().conversion.makes_mask

    def initial_config(self) -> dict[str, Any]:
        """The configuration of the checkpoint that training starts from; empty before there is one."""
        path = self.initial / "config.json"
        return read_json(path, RunError) if path.is_file() else {}

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
