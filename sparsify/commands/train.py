"""`sparsify train`: a recipe to its end. The run, its baseline, report and export; stages talk through the run folder.

`engine=auto` of a run: resolved once, on the launcher, before recipe.yaml is written.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from sparsify.commands import rank
from sparsify.commands.report import make_report
from sparsify.commands.run import train_run
from sparsify.export.bundle import export
from sparsify.files import write_json
from sparsify.launch.hosts import placement
from sparsify.launch.launcher import serve
from sparsify.launch.nodes import rendezvous_of
from sparsify.plan import auto_sentence, resolve_engine, this_machine
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.engine import AUTO_STAGE
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import (
    ActivationSection,
    BlendingSection,
    ConversionSection,
    DistillationSection,
    PenaltySection,
)
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.report import SparsityReport, read_report

logger = logging.getLogger(__name__)

ENGINE_SETTINGS = ("zero_stage", "offload_optimizer_to_cpu", "offload_parameters_to_cpu")
TRAINING_SETTINGS = ("micro_batch_size", "gradient_checkpointing")


def resolve_for_this_machine(recipe: Recipe) -> Recipe:
    """Gives a recipe with `engine=auto` concrete numbers: those that its run began with, or else the cheapest that fit.

    Args:
        recipe: A composed recipe; one with a concrete stage is returned as it is.

    Raises:
        RecipeError: If nothing fits this machine.
    """
    if recipe.engine.zero_stage != AUTO_STAGE:
        return recipe
    hardware = this_machine(recipe.launch.processes, recipe.launch.nodes)
    begun = _begun(recipe)
    if begun is not None:
        for section, keys in (("engine", ENGINE_SETTINGS), ("training", TRAINING_SETTINGS)):
            for key in keys:
                setattr(getattr(recipe, section), key, getattr(getattr(begun, section), key))
        # Other processes continue with the same global batches, in whole micro-batches.
        sequences = recipe.training.global_batch_size // recipe.launch.total_processes
        recipe.training.micro_batch_size = math.gcd(begun.training.micro_batch_size, sequences)
        logger.info(f"engine=auto: ZeRO-{recipe.engine.zero_stage}, as this run began")
        return recipe
    resolved, choice = resolve_engine(recipe, hardware=hardware)
    assert choice is not None
    logger.info(auto_sentence(choice, hardware))
    return resolved


def _begun(recipe: Recipe) -> Recipe | None:
    """What the run was begun with, where it has begun to train."""
    run = RunFolder(Path(recipe.run_dir))
    return run.load_recipe() if run.mixture_lock.is_file() else None


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


def train(name_or_path: str, overrides: Sequence[str]) -> RunResult | None:
    """Runs a recipe from where it was stopped to its end: the run, its baseline, report and export.

    Args:
        name_or_path: Recipe name or path.
        overrides: Hydra overrides.

    Returns:
        None on any node but the first, which has the result.

    Raises:
        UserError: Whatever is wrong with the recipe, the model, the data or the disk.
        sparsify.launch.launcher.Interrupted: After a clean save.
    """
    recipe = compose_recipe(name_or_path, overrides)
    with ExitStack() as stack:
        place = stack.enter_context(placement(recipe.launch, ["train", name_or_path, *overrides]))
        if place.overrides:
            recipe = compose_recipe(name_or_path, [*overrides, *place.overrides])
        nodes = stack.enter_context(rendezvous_of(recipe.launch, place.started_nodes))
        if recipe.launch.node_rank > 0:
            logger.info(f"Node {recipe.launch.node_rank} of {recipe.launch.nodes} follows node 0")
            serve(rank, nodes)
            return None
        recipe = resolve_for_this_machine(recipe)
        run = RunFolder(Path(recipe.run_dir))
        trained = train_run(recipe, run, nodes)
        if recipe.baseline.ffn_activation is not None:
            logger.info(f"Baseline: {recipe.baseline.ffn_activation} on the same tokens")
            trained |= train_run(_baseline_recipe(recipe, run), run.baseline, nodes)
    return _finish(name_or_path, recipe, run, anew=trained)


def _baseline_recipe(recipe: Recipe, run: RunFolder) -> Recipe:
    baseline = deepcopy(recipe)
    assert recipe.baseline.ffn_activation is not None
    baseline.activation = ActivationSection(recipe.baseline.ffn_activation)
    baseline.conversion = ConversionSection()
    baseline.baseline.ffn_activation = None
    baseline.blending, baseline.penalty = BlendingSection(), PenaltySection()
    baseline.distillation = DistillationSection()
    baseline.name, baseline.run_dir = f"{recipe.name}-baseline", str(run.baseline.path)
    return baseline


def _finish(given: str, recipe: Recipe, run: RunFolder, *, anew: bool) -> RunResult:
    """Report and export of a trained run; reused when nothing was trained since."""
    samples_path = run.path / "samples.json"
    if anew or not run.report.is_dir():
        report, _ = make_report(
            str(run.path),
            None,
            recipe.eval.report_tokens,
            run.report,
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
