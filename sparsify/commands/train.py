"""`sparsify train`: the run of a recipe, its baseline, report and export, which communicate through the run folder."""

from __future__ import annotations

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
from rich.text import Text

from sparsify.commands import rank
from sparsify.commands.report import make_report
from sparsify.commands.run import BUNDLE_MARK, check_start, refuse_foreign_run, source_stores_mask, train_run
from sparsify.errors import RunError, UserError
from sparsify.export.bundle import export
from sparsify.export.check import check_hashes
from sparsify.files import refuse_foreign_folder, write_json
from sparsify.launch.hosts import placement
from sparsify.launch.launcher import serve
from sparsify.launch.nodes import rendezvous_of
from sparsify.metadata import read_json
from sparsify.methods.base import check_method, upcycling_of
from sparsify.plan import auto_sentence, resolve_engine, this_machine
from sparsify.recipe.compose import compose_recipe
from sparsify.recipe.engine import AUTO_STAGE
from sparsify.recipe.recipe import Recipe
from sparsify.recipe.sparsification import (
    ActivationSection,
    BlendingSection,
    ConversionSection,
    DistillationSection,
    GroupRoutingSection,
    PenaltySection,
)
from sparsify.reporting.numbers import share
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked
from sparsify.runs.history import has_trained
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.run_lock import RunLock
from sparsify.sparsity.active_parameters import ffn_byte_shares
from sparsify.sparsity.report import SparsityReport, layers_table, read_report, routing_table

logger = logging.getLogger(__name__)

ENGINE_SETTINGS = ("zero_stage", "offload_optimizer_to_cpu", "offload_parameters_to_cpu")
TRAINING_SETTINGS = ("micro_batch_size", "gradient_checkpointing")


def resolve_for_this_machine(recipe: Recipe) -> Recipe:
    """Resolves `engine=auto`: to the settings that the run began with, or to the cheapest that fit.

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
    return run.load_recipe() if run.mixture_lock.is_file() and has_trained(run) else None


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

    Returns:
        None on any node but the first, which has the result.

    Raises:
        UserError: On an error of the recipe, the model, the data or the disk.
        sparsify.launch.child.Interrupted: After a clean save.
    """
    recipe = compose_recipe(name_or_path, overrides)
    check_method(recipe.conversion)
    with ExitStack() as held:
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
            held.enter_context(RunLock(run.path))
            for folder in (run, run.baseline):
                refuse_foreign_run(folder)
            trained = train_run(recipe, run, nodes)
            baseline = baseline_recipe(recipe, run)
            if baseline is not None:
                logger.info(f"Baseline: {baseline.activation.ffn_activation} on the same tokens")
                trained |= train_run(baseline, run.baseline, nodes)
        return _finish(name_or_path, recipe, run, trained=trained)


def check_sweep(name_or_path: str, points: Sequence[Sequence[str]]) -> None:
    """Composes and checks every point of a sweep, before the first one trains.

    Raises:
        UserError: The first point's that cannot be trained, with its overrides.
    """
    common = set(points[0]).intersection(*points)
    for point in points:
        try:
            recipe = compose_recipe(name_or_path, point)
            check_method(recipe.conversion)
            check_start(resolve_for_this_machine(recipe), RunFolder(Path(recipe.run_dir)))
        except UserError as error:
            own = " ".join(override for override in point if override not in common) or " ".join(point)
            raise type(error)(
                f"{own}: {error.given}",
                allowed=error.allowed,
                next_step=f"{error.next_step} None of the {len(points)} runs was started.".lstrip(),
            ) from error


def baseline_recipe(recipe: Recipe, run: RunFolder) -> Recipe | None:
    """The recipe of a run's baseline: its activation, no mask, dense weights, and the architecture of the source.

    Args:
        recipe: The run's recipe.
        run: Its folder, with the checkpoint that training starts from.

    Returns:
        None if no baseline is wanted, or if it would repeat the run itself.
    """
    name = recipe.baseline.ffn_activation
    is_dense = not (run.is_masked or run.has_sparse_weights) and upcycling_of(recipe.conversion) is None
    if name is None or (name == recipe.activation.ffn_activation and is_dense):
        return None
    baseline = deepcopy(recipe)
    baseline.activation = ActivationSection(name)
    baseline.conversion = ConversionSection(drop_source_mask=source_stores_mask(recipe, run))
    if recipe.model.dense_source is not None:
        baseline.model.source, baseline.model.dense_source = recipe.model.dense_source, None
        baseline.conversion = ConversionSection()
    baseline.baseline.ffn_activation = None
    baseline.blending, baseline.penalty = BlendingSection(), PenaltySection()
    baseline.distillation, baseline.group_routing = DistillationSection(), GroupRoutingSection()
    baseline.name, baseline.run_dir = f"{recipe.name}-baseline", str(run.baseline.path)
    return baseline


def _finish(given: str, recipe: Recipe, run: RunFolder, *, trained: bool) -> RunResult:
    samples_path = run.path / "samples.json"
    report = None if trained else _kept_report(run)
    if report is None:
        report, _ = make_report(
            str(run.path),
            None,
            recipe.eval.report_tokens,
            run.report,
            curve_tokens=recipe.eval.report_curve_tokens,
        )
    written = None if trained else _kept_samples(run, samples_path)
    if written is None:
        refuse_foreign_folder(run.export, BUNDLE_MARK, "export bundle")
        shutil.rmtree(run.export, ignore_errors=True)  # ours, of an earlier checkpoint of this run or damaged
        run.decoding.unlink(missing_ok=True)
        bundle = export(run.path, run.export, recipe.eval.sample_prompts, recipe.eval.sample_tokens)
        assert bundle.acceptance is not None
        written = {"checked": bundle.acceptance.sentence(), "samples": bundle.acceptance.samples}
        write_json(samples_path, written)
    samples = list(zip(recipe.eval.sample_prompts, written["samples"], strict=False))
    return RunResult(given, run, recipe, report, samples, written["checked"])


def _kept_report(run: RunFolder) -> SparsityReport | None:
    """The report of a run that was trained before; None if there is none, or a damaged one, which is said."""
    if not run.report.is_dir():
        return None
    try:
        return read_report(run.report)
    except UserError as error:
        logger.warning(f"{error.given} The report is written again.")
        return None


def _kept_samples(run: RunFolder, path: Path) -> dict[str, Any] | None:
    """What the check of a run's export gave; None if the export or that is missing or damaged, which is said."""
    if not run.export.is_dir() or not path.is_file():
        return None
    hashes = check_hashes(run.export)
    if not hashes.holds:
        logger.warning(f"{run.export} is not as it was written: {hashes.found}. It is written again.")
        return None
    try:
        written = read_json(path, RunError)
        if isinstance(written.get("checked"), str) and _are_texts(written.get("samples")):
            return written
        logger.warning(f"{path} is not as it was written. The export is written again.")
    except RunError as error:
        logger.warning(f"{error.given} The export is written again.")
    return None


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(one, str) for one in value)


def run_summary(result: RunResult, decoding: RenderableType | None = None) -> RenderableType:
    """What a run found. `decoding` is the speed of its export, if that was timed."""
    recipe, run = result.recipe, result.run
    budget_tokens = recipe.num_steps * recipe.step_tokens
    losses = Table(
        f"{recipe.name}: {recipe.activation.ffn_activation}, {budget_tokens:,} training tokens",
        ["model", "validation loss", "perplexity", "exact zeros", "FFN weights read per token"],
    )
    for stage in result.report.stages:
        routed = result.report.hidden_routing is not None  # then zeros of neurons are not all that is skipped
        read = (
            ffn_byte_shares(stage.gate_zeros or 0.0, stage.zeros)[0] if stage.zeros is not None and not routed else None
        )
        losses.add(stage.name, f"{stage.loss:.3f}", f"{math.exp(stage.loss):,.1f}", share(stage.zeros), share(read))
    parts: list[RenderableType] = ["", losses, *([decoding] if decoding else []), layers_table(result.report)]
    if result.report.hidden_routing is not None:
        parts.append(routing_table(result.report))
    if result.samples:
        parts += [Text("The exported checkpoint, in a fresh process, continues", "bold")]
        for prompt, continuation in result.samples:
            parts += [
                Text(prompt, style="bold cyan") + Text(continuation.rstrip(), style="default"),
                "",
            ]
    parts += [
        f"Export: {result.checked}.",
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
    return Text("\n").join(marked("[bold]{}[/bold] {}", f"{name:8}", place) for name, place in places.items())


def next_commands(given: str, path: Path) -> Text:
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
    lines = [marked("  [dim]# {}[/dim]\n  [cyan]{}[/cyan]", *item) for item in commands.items()]
    return Text("\n").join([Text("Next", "bold"), *lines])


def run_record(result: RunResult) -> dict[str, Any]:
    return {
        "run": str(result.run.path),
        "stages": [stage.model_dump() for stage in result.report.stages],
        "zeros": result.report.product_zeros,
        "layers": [row.product_zeros for row in result.report.layer_rows],
        "samples": [{"prompt": prompt, "continuation": text} for prompt, text in result.samples],
        "export": result.checked,
    }
