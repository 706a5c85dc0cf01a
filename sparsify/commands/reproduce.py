"""`sparsify reproduce`: the command that reproduces a bundle, from the recipe in it."""

from __future__ import annotations

import importlib.metadata
import shlex
from dataclasses import dataclass
from pathlib import Path

from sparsify.commands.train import RunResult, train
from sparsify.errors import ExportError
from sparsify.metadata import read_json, user_path
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.recipe.compose import load_recipe
from sparsify.sparsity.report import read_report

WATCHED = ("torch", "transformers", "deepspeed", "datasets")


@dataclass(frozen=True)
class Reproduction:
    """How to reproduce a bundle.

    Attributes:
        differences: Differences between this environment and the recorded one.
    """

    arguments: list[str]
    run_dir: Path
    differences: list[str]

    @property
    def command(self) -> str:
        return shlex.join(["sparsify", *self.arguments])


def reproduction(bundle: Path, to: Path | None) -> Reproduction:
    """Plans the reproduction of a bundle from its recipe.

    Raises:
        ExportError: If the folder is not a bundle.
    """
    path = bundle / "training" / "recipe.yaml"
    if not path.is_file():
        raise ExportError(
            f"{bundle} is not a bundle: it has no training/recipe.yaml.",
            allowed="A folder that `sparsify export RUN --to DIR` wrote.",
        )
    recipe = load_recipe(path)
    run_dir = to or Path("reproductions") / recipe.name
    arguments = ["train", str(path), f"run_dir={run_dir}"]
    differences = _software(bundle / "training" / "environment.json")
    source = recipe.model.source
    if source and source.startswith(("/", ".", "~")) and not user_path(source).exists():
        differences.append(f"model.source {source} is not here: add model.source=… to the command")
    return Reproduction(arguments, run_dir, differences)


def _software(path: Path) -> list[str]:
    if not path.is_file():
        return []
    recorded = read_json(path, ExportError).get("packages")
    if not isinstance(recorded, dict):
        raise ExportError(f"{path} names no packages.", next_step="Copy or download the bundle again.")
    return [
        f"{name} is {here} here and was {recorded[name]}"
        for name in WATCHED
        if name in recorded and (here := importlib.metadata.version(name)) != recorded[name]
    ]


def reproduce(bundle: Path, plan: Reproduction) -> list[str]:
    """Runs the reproduction; returns sentences that say whether the data are the same, and both losses."""
    result = train(str(bundle / "training" / "recipe.yaml"), plan.arguments[2:])
    if result is None:
        return []
    old = read_lock(bundle / "training" / "mixture.lock.json")
    return [_same_data(old, read_lock(result.run.mixture_lock)), _losses(bundle, result)]


def _same_data(old: MixtureLock, new: MixtureLock) -> str:
    if old == new:
        return "The data are the same, source by source."
    other = [name for name in old.sources if new.sources.get(name) != old.sources[name]]
    return f"The data differ: {', '.join(other) or 'tokenizer, sequence or seed'}."


def _losses(bundle: Path, result: RunResult) -> str:
    kept = bundle / "sparsity" / "report.json"
    if not kept.is_file():
        return f"Loss {result.report.loss:.4f}; the bundle has no report to compare with."
    before = read_report(kept.parent)
    return (
        f"Loss {result.report.loss:.4f} (the bundle's report: {before.loss:.4f}), exact zeros "
        f"{result.report.product_zeros:.2%} ({before.product_zeros:.2%}). New run: {result.run.path}"
    )
