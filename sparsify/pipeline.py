"""The way through: recipe → data → conversion → training → report → export. Stages talk through the run folder."""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparsify.catalogue import compose_recipe, save_recipe
from sparsify.conversion.convert import Converted, convert
from sparsify.conversion.folder import load_sparse, load_tokenizer
from sparsify.conversion.source import read_checkpoint
from sparsify.errors import RecipeError, RunError
from sparsify.export.bundle import Bundle, export
from sparsify.export.weights import load
from sparsify.files import storage_errors, write_json
from sparsify.mixture.heldout import check_text_or_mixture, mixture_windows, windows_from
from sparsify.mixture.lock import check_lock, read_lock, write_lock
from sparsify.mixture.windows import Window, collate
from sparsify.recipe import EXECUTION_SETTINGS, FFN_ACTIVATIONS, ModelSection, Recipe
from sparsify.recipe_rules import check_choice
from sparsify.sparsity.report import SparsityReport, measure, read_report, write_report
from sparsify.training.checkpoints import latest_checkpoint, read_state
from sparsify.training.data import lock_of, open_sources
from sparsify.training.history import stages, trajectory
from sparsify.training.launcher import launch
from sparsify.training.run_folder import RunFolder

Say = Callable[[str], None]

IDENTITY_SECTIONS = ("model", "activation", "mixture", "training", "optimizer")
"""Sections that decide what is trained: a run cannot go on with others."""
LOCK_SECONDS = 2.0
"""Ranks outlive a killed launcher by less than this."""
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "sparsify-lm")


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


def train(name_or_path: str, overrides: Sequence[str], say: Say) -> RunResult:
    """Runs a recipe from wherever it stands to its end: the run, its control, report and export.

    Args:
        name_or_path: Recipe name or path.
        overrides: Hydra overrides.
        say: Told what happens, a line at a time.

    Raises:
        UserError: Whatever is wrong with the recipe, the model, the data or the disk.
        sparsify.training.launcher.Interrupted: After a clean save.
    """
    recipe = compose_recipe(name_or_path, overrides)
    run = RunFolder(Path(recipe.run_dir))
    trained = train_run(recipe, run, say)
    if recipe.control.ffn_activation is not None:
        say(f"Control: {recipe.control.ffn_activation} on the same tokens")
        trained |= train_run(_control_recipe(recipe, run), run.control, say)
    return _finish(name_or_path, recipe, run, say, anew=trained)


def train_run(recipe: Recipe, run: RunFolder, say: Say) -> bool:
    """Trains one arm. Returns whether there was anything left to train.

    Raises:
        RunError: If another process is training it now, or it was begun with other settings.
    """
    with _only_one(run):
        return _train_alone(recipe, run, say)


@contextmanager
def _only_one(run: RunFolder) -> Iterator[None]:
    with storage_errors(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.path / ".lock")
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout as error:
            raise RunError(
                f"Another process is training {run.path}.",
                next_step="Wait for it, stop it, or choose another folder with run_dir=….",
            ) from error
    try:
        yield
    finally:
        lock.release()


def _train_alone(recipe: Recipe, run: RunFolder, say: Say) -> bool:
    _open_run(recipe, run)
    if not run.initial.is_dir():
        converted = _convert(recipe, run.initial)
        say(f"Model: {_describe(converted)}")
    _check_context(recipe, run)
    _prepare_data(recipe, run, say)
    newest = latest_checkpoint(run.checkpoints)
    step = read_state(newest).step if newest else 0
    if step == recipe.num_steps:
        say(f"Trained already: {run.path}")
        return False
    if step:
        say(f"Going on from step {step:,} of {recipe.num_steps:,}")
    launch(run, recipe.launch)
    return True


def _control_recipe(recipe: Recipe, run: RunFolder) -> Recipe:
    control = deepcopy(recipe)
    assert recipe.control.ffn_activation is not None
    control.activation.ffn_activation = recipe.control.ffn_activation
    control.control.ffn_activation = None
    control.name, control.run_dir = f"{recipe.name}-control", str(run.control.path)
    return control


def _open_run(recipe: Recipe, run: RunFolder) -> None:
    """Records what is to be run, or makes sure that it is what was begun."""
    if run.mixture_lock.is_file():
        check_same(run.load_recipe(), recipe, run)
    elif run.initial.is_dir():
        shutil.rmtree(run.initial)  # nothing was trained from it, and the recipe may be another now
    save_recipe(recipe, run.recipe)
    write_json(run.environment, environment())


def check_same(before: Recipe, now: Recipe, run: RunFolder) -> None:
    """Refuses to go on with a run under other settings than it was begun with.

    Raises:
        RunError: Naming the first setting that differs, with both values.
    """
    for section in IDENTITY_SECTIONS:
        old, new = asdict(getattr(before, section)), asdict(getattr(now, section))
        changed = [key for key in old if old[key] != new.get(key) and key not in EXECUTION_SETTINGS]
        if changed:
            key = changed[0]
            raise RunError(
                f"{run.path} was begun with {section}.{key}={old[key]}; this command says {new.get(key)}.",
                allowed=f"A run goes on only as it began ({', '.join(IDENTITY_SECTIONS)}).",
                next_step="Choose another folder with run_dir=…, or remove this one.",
            )


def environment() -> dict[str, Any]:
    """The software and the machine, for the record."""
    return {
        "command": " ".join(["sparsify", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in PACKAGES},
    }


def _convert(recipe: Recipe, to: Path) -> Converted:
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    # Random weights are born in fp32, so that both precisions start from the same values.
    born = torch.float32 if recipe.model.init == "random" else dtype
    return convert(
        recipe.model, recipe.activation.ffn_activation, to, seed=recipe.training.seed, dtype=born
    )


def _describe(converted: Converted) -> str:
    config = converted.config
    shapes = read_checkpoint(converted.folder).shapes.values()
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return (
        f"{converted.origin} as {config.model_type} with {config.ffn_activation}, "
        f"{num_parameters / 1e6:,.1f}M parameters, {config.num_hidden_layers} layers"
    )


def _check_context(recipe: Recipe, run: RunFolder) -> None:
    context = read_checkpoint(run.initial).config["max_position_embeddings"]
    if recipe.training.window_tokens > context:
        raise RecipeError(
            f"training.window_tokens is {recipe.training.window_tokens}, longer than the model's context.",
            allowed=f"At most {context} tokens for this model.",
            next_step=f"Set training.window_tokens={context} or less.",
        )


def _prepare_data(recipe: Recipe, run: RunFolder, say: Say) -> None:
    """Tokenises what is not in the cache yet, and fixes in the lock what this run reads."""
    lock = lock_of(recipe, open_sources(recipe, run, _ingest_progress(say)))
    if run.mixture_lock.is_file():
        check_lock(read_lock(run.mixture_lock), lock)
    else:
        write_lock(lock, run.mixture_lock)
        parts = (
            f"{name} {source.token_share:.1%} ({source.epochs:.2f} epochs)"
            for name, source in lock.sources.items()
        )
        say("Data: " + ", ".join(parts))


def _ingest_progress(say: Say) -> Callable[[str, int, int], None]:
    last: dict[str, int] = {}

    def progress(source: str, tokens: int, needed_tokens: int) -> None:
        tenth = 10 * tokens // max(needed_tokens, 1)
        if tenth > last.get(source, 0):
            last[source] = tenth
            say(f"Tokenising {source}: {tokens:,} of {needed_tokens:,} tokens")

    return progress


def _finish(given: str, recipe: Recipe, run: RunFolder, say: Say, *, anew: bool) -> RunResult:
    """Report and export of a trained run; reused when nothing was trained since."""
    samples_path = run.path / "samples.json"
    if anew or not run.report.is_dir():
        report, _ = make_report(str(run.path), None, recipe.eval.report_tokens, run.report, say)
    else:
        report = read_report(run.report)
    if anew or not run.export.is_dir() or not samples_path.is_file():
        shutil.rmtree(run.export, ignore_errors=True)  # ours, of an earlier checkpoint of this run
        bundle = export(run.path, run.export, recipe.eval.sample_prompts, recipe.eval.sample_tokens)
        write_json(
            samples_path,
            {"checked": bundle.acceptance.sentence(), "samples": bundle.acceptance.samples},
        )
    written = json.loads(samples_path.read_text())
    samples = list(zip(recipe.eval.sample_prompts, written["samples"], strict=False))
    return RunResult(given, run, recipe, report, samples, written["checked"])


def make_report(
    model_or_run: str, on: str | None, num_tokens: int, to: Path | None, say: Say
) -> tuple[SparsityReport, Path]:
    """Measures a model or a run on held-out text and writes its report.

    Args:
        model_or_run: Model folder, Hub id, run folder or checkpoint.
        on: Text file, mixture name or mixture path; a run's own mixture, else the quickstart's, unless given.
        num_tokens: Tokens to measure on.
        to: Folder of the report; RUN/report or reports/NAME unless given.
        say: Told what happens.

    Returns:
        The report and the folder that holds it.
    """
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    windows, text = _report_windows(loaded, on, num_tokens)
    say(f"Measuring {loaded.name} on {sum(len(w.input_ids) for w in windows):,} tokens: {text}")
    report, statistics = measure(
        loaded.model, (collate([window]) for window in windows), name=loaded.name, text=text
    )
    report.command = " ".join(["sparsify", *sys.argv[1:]])
    if loaded.trained is not None:
        report.stages = stages(loaded.trained.run)
        report.trajectory = trajectory(loaded.trained.run)
    name = re.sub("[^-.0-9A-Za-z_]+", "-", model_or_run).strip("-.")
    default = loaded.trained.run.report if loaded.trained else Path("reports") / name
    folder = to or default
    write_report(report, statistics, folder)
    return report, folder


def _report_windows(loaded: Any, on: str | None, num_tokens: int) -> tuple[list[Window], str]:
    recipe = loaded.trained.run.load_recipe() if loaded.trained else None
    window_tokens = min(512, loaded.model.config.max_position_embeddings)
    if recipe is not None:
        window_tokens = recipe.training.window_tokens
    settings = {
        "num_tokens": num_tokens,
        "window_tokens": window_tokens,
        "cache_dir": Path(recipe.cache_dir if recipe else Recipe().cache_dir).expanduser(),
    }
    if on is None and recipe is not None:
        windows = mixture_windows(recipe.mixture, loaded.tokenizer, **settings)
        return windows, f"held-out windows of mixture {recipe.mixture.name}"
    return windows_from(on or "quickstart", loaded.tokenizer, **settings)


@dataclass(frozen=True)
class Swap:
    """What a conversion wrote, and what it did to the loss."""

    converted: Converted
    text: str
    num_tokens: int
    loss_before: float
    loss_after: float
    zeros_before: float
    zeros_after: float


def convert_model(source: str, ffn_activation: str, to: Path, on: str, num_tokens: int) -> Swap:
    """Converts a checkpoint and measures the swap on a text.

    Args:
        source: Checkpoint folder, Hub id, GGUF file or package:NAME/PATH.
        ffn_activation: The activation to give it.
        to: Folder to write.
        on: Text file, mixture name or mixture path.
        num_tokens: Tokens to measure on.
    """
    check_choice("--activation", ffn_activation, FFN_ACTIVATIONS)
    check_text_or_mixture(on)
    model = ModelSection(source=source)
    converted = convert(model, ffn_activation, to, seed=0, dtype=torch.bfloat16)  # nothing is drawn
    tokenizer = load_tokenizer(to)
    windows, text = windows_from(
        on,
        tokenizer,
        num_tokens=num_tokens,
        window_tokens=min(512, converted.config.max_position_embeddings),
        cache_dir=Path(Recipe().cache_dir).expanduser(),
    )
    reports = [
        measure(
            load_sparse(to, activation), (collate([w]) for w in windows), name=str(to), text=text
        )[0]
        for activation in (converted.config.base_ffn_activation, ffn_activation)
    ]
    return Swap(
        converted,
        text,
        reports[1].num_tokens,
        reports[0].loss,
        reports[1].loss,
        reports[0].product_zeros,
        reports[1].product_zeros,
    )


def export_run(run_or_checkpoint: str, to: Path) -> Bundle:
    """Exports the bundle of a run's newest checkpoint, or of one checkpoint."""
    return export(Path(run_or_checkpoint).expanduser(), to)
