"""`sparsify train`: the run of a recipe, its baseline, report and export, which communicate through the run folder."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from sparsify.commands import rank
from sparsify.commands.report import make_report
from sparsify.commands.run import train_run
from sparsify.export.bundle import export
from sparsify.files import write_json
from sparsify.launch.hosts import placement
from sparsify.launch.launcher import serve
from sparsify.launch.nodes import rendezvous_of
from sparsify.methods.base import check_method
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
from sparsify.reporting.numbers import share
from sparsify.reporting.tables import Table
from sparsify.runs.run_folder import RunFolder
from sparsify.sparsity.report import SparsityReport, layers_table, read_report

logger = logging.getLogger(__name__)

ENGINE_SETTINGS = ("zero_stage", "offload_optimizer_to_cpu", "offload_parameters_to_cpu")
TRAINING_SETTINGS = ("micro_batch_size", "gradient_checkpointing")


def resolve_for_this_machine(recipe: Recipe) -> Recipe:
    """Resolves `engine=auto`: to the settings that the run began with, or to the cheapest that fit.

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
    run = RunFolder(Path(recipe.run_dir))
    return run.load_recipe() if run.mixture_lock.is_file() else None


@dataclass(frozen=True)
class RunResult:
    given: str
    """Recipe name or path as the user gave it."""
    run: RunFolder
    recipe: Recipe
    report: SparsityReport
    samples: list[tuple[str, str]]
    """Prompt and its continuation by the exported checkpoint in a fresh process."""
    checked: str
    """Result of the export's acceptance check."""


def train(name_or_path: str, overrides: Sequence[str]) -> RunResult | None:
    """Runs or resumes a recipe: the run, its baseline, report and export.

    Args:
        name_or_path: Recipe name or path.
        overrides: Hydra overrides.

    Returns:
        None on any node but the first, which has the result.

    Raises:
        UserError: On an error of the recipe, the model, the data or the disk.
        sparsify.launch.launcher.Interrupted: After a clean save.
    """
    recipe = compose_recipe(name_or_path, overrides)
    check_method(recipe.conversion)
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
    return _finish(name_or_path, recipe, run, trained=trained)


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


def _finish(given: str, recipe: Recipe, run: RunFolder, *, trained: bool) -> RunResult:
    samples_path = run.path / "samples.json"
    if trained or not run.report.is_dir():
        report, _ = make_report(
            str(run.path),
            None,
            recipe.eval.report_tokens,
            run.report,
            curve_tokens=recipe.eval.report_curve_tokens,
        )
    else:
        report = read_report(run.report)
    if trained or not run.export.is_dir() or not samples_path.is_file():
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


def run_summary(result: RunResult) -> RenderableType:
    """The summary of a run for the terminal, with the next commands."""
    recipe, run = result.recipe, result.run
    budget_tokens = recipe.num_steps * recipe.step_tokens
    losses = Table(
        f"{recipe.name}: {recipe.activation.ffn_activation}, {budget_tokens:,} training tokens",
        ["model", "validation loss", "perplexity", "exact zeros"],
    )
    for stage in result.report.stages:
        losses.add(stage.name, f"{stage.loss:.3f}", f"{math.exp(stage.loss):,.1f}", share(stage.zeros))
    parts: list[RenderableType] = ["", losses, layers_table(result.report)]
    if result.samples:
        parts += ["[bold]The exported checkpoint, in a fresh process, continues[/bold]"]
        for prompt, continuation in result.samples:
            parts += [
                Text(prompt, style="bold cyan") + Text(continuation.rstrip(), style="default"),
                "",
            ]
    parts += [
        f"Export: {escape(result.checked)}.",
        "",
        _places(run.path),
        "",
        next_commands(result.given, result.run.path),
    ]
    return Group(*parts)


def _places(path: Path) -> RenderableType:
    places = {
        "Report": path / "report" / "index.html",
        "Export": path / "export",
        "Metrics": path / "metrics.jsonl",
    }
    return "\n".join(f"[bold]{name:8}[/bold] {escape(str(place))}" for name, place in places.items())


def next_commands(given: str, path: Path) -> str:
    """The next commands after a run, given the recipe as the user named it and the run's folder."""
    ratio = f"sparsify train {given} mixture.instruction_token_share=0.3"
    # `make quickstart` calls the command by its path; the next one is typed by the user.
    commands = {}
    if sys.prefix != sys.base_prefix and shutil.which("sparsify") is None:
        activate = Path(sys.prefix) / "bin" / "activate"
        commands["put sparsify on your path"] = f"source {activate}"
    commands |= {
        "another mixture ratio": ratio,
        "how sparse it is on your own text": f"sparsify report {path} --on YOUR_TEXT.txt",
        "a bundle to give away": f"sparsify export {path} --to my-sparse-model",
    }
    lines = [f"  [dim]# {purpose}[/dim]\n  [cyan]{escape(command)}[/cyan]" for purpose, command in commands.items()]
    return "\n".join(["[bold]Next[/bold]", *lines])


def run_record(result: RunResult) -> dict[str, Any]:
    return {
        "run": str(result.run.path),
        "stages": [stage.model_dump() for stage in result.report.stages],
        "zeros": result.report.product_zeros,
        "layers": [row.product_zeros for row in result.report.layer_rows],
        "samples": [{"prompt": prompt, "continuation": text} for prompt, text in result.samples],
        "export": result.checked,
    }
