"""`sparsify train`: a recipe to its end. The run, its control, report and export; stages talk through the run folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from sparsify.catalogue import compose_recipe
from sparsify.export.bundle import export
from sparsify.files import write_json
from sparsify.recipe import (
    ActivationSection,
    ConversionSection,
    DistillationSection,
    Recipe,
    SparsitySection,
    SwapSection,
)
from sparsify.sparsity.report import SparsityReport, read_report
from sparsify.training.hosts import placed
from sparsify.training.launcher import serve
from sparsify.training.nodes import joined
from sparsify.training.run_folder import RunFolder
from sparsify.verbs import Say
from sparsify.verbs.arm import train_run
from sparsify.verbs.auto import resolve_for_this_machine
from sparsify.verbs.report import make_report


@dataclass(frozen=True)
class RunResult:
    """A finished run, and what there is to show of it."""

    given: str
    """Recipe name or path as the user gave it."""
    run: RunFolder
    recipe: Recipe
    report: SparsityReport
    samples: list[tuple[str, str]]
    """Prompt and its continuation by the exported checkpoint in a fresh process."""
    checked: str
    """What the export's acceptance found, in words."""


def train(name_or_path: str, overrides: Sequence[str], say: Say) -> RunResult | None:
    """Runs a recipe from wherever it stands to its end: the run, its control, report and export.

    Args:
        name_or_path: Recipe name or path.
        overrides: Hydra overrides.
        say: Told what happens, a line at a time.

    Returns:
        None on any node but the first, which has the result.

    Raises:
        UserError: Whatever is wrong with the recipe, the model, the data or the disk.
        sparsify.training.launcher.Interrupted: After a clean save.
    """
    recipe = compose_recipe(name_or_path, overrides)
    with ExitStack() as stack:
        place = stack.enter_context(placed(recipe.launch, ["train", name_or_path, *overrides]))
        if place.overrides:
            recipe = compose_recipe(name_or_path, [*overrides, *place.overrides])
        nodes = stack.enter_context(joined(recipe.launch, place.followers))
        if recipe.launch.node_rank > 0:
            say(f"Node {recipe.launch.node_rank} of {recipe.launch.nodes} follows node 0")
            serve(nodes)
            return None
        recipe = resolve_for_this_machine(recipe, say)
        run = RunFolder(Path(recipe.run_dir))
        trained = train_run(recipe, run, say, nodes)
        if recipe.control.ffn_activation is not None:
            say(f"Control: {recipe.control.ffn_activation} on the same tokens")
            trained |= train_run(_control_recipe(recipe, run), run.control, say, nodes)
    return _finish(name_or_path, recipe, run, say, anew=trained)


def _control_recipe(recipe: Recipe, run: RunFolder) -> Recipe:
    control = deepcopy(recipe)
    assert recipe.control.ffn_activation is not None
    control.activation = ActivationSection(recipe.control.ffn_activation)
    control.conversion = ConversionSection()
    control.control.ffn_activation = None
    control.swap, control.sparsity = SwapSection(), SparsitySection()
    control.distillation = DistillationSection()
    control.name, control.run_dir = f"{recipe.name}-control", str(run.control.path)
    return control


def _finish(given: str, recipe: Recipe, run: RunFolder, say: Say, *, anew: bool) -> RunResult:
    """Report and export of a trained run; reused when nothing was trained since."""
    samples_path = run.path / "samples.json"
    if anew or not run.report.is_dir():
        report, _ = make_report(
            str(run.path),
            None,
            recipe.eval.report_tokens,
            run.report,
            say,
            curve_tokens=recipe.eval.report_curve_tokens,
        )
    else:
        report = read_report(run.report)
    if anew or not run.export.is_dir() or not samples_path.is_file():
        shutil.rmtree(run.export, ignore_errors=True)  # ours, of an earlier checkpoint of this run
        bundle = export(run.path, run.export, recipe.eval.sample_prompts, recipe.eval.sample_tokens)
        assert bundle.acceptance is not None
        write_json(
            samples_path,
            {"checked": bundle.acceptance.sentence(), "samples": bundle.acceptance.samples},
        )
    written = json.loads(samples_path.read_text())
    samples = list(zip(recipe.eval.sample_prompts, written["samples"], strict=False))
    return RunResult(given, run, recipe, report, samples, written["checked"])
