"""The export bundle: one folder that loads offline with nothing but transformers, and says how it came to be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from sparsify.conversion.calibrated import RECORD
from sparsify.conversion.folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ExportError, RunError
from sparsify.export.acceptance import Acceptance, accept
from sparsify.export.sums import write_sums
from sparsify.export.weights import Trained, find_trained, load_trained
from sparsify.files import atomic_folder
from sparsify.mixture.lock import read_lock
from sparsify.sparsity.report import read_report
from sparsify.training.checkpoints import REFERENCE, STATE, read_state
from sparsify.training.history import stages

SHARD_BYTES = "5GB"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was accepted."""

    folder: Path
    num_files: int
    size_bytes: int
    acceptance: Acceptance


def export(
    run_or_checkpoint: Path, to: Path, prompts: Sequence[str] = (), sample_tokens: int = 48
) -> Bundle:
    """Writes the bundle of a run's newest checkpoint, or of one checkpoint, and checks it before it takes its name.

    Args:
        run_or_checkpoint: Run folder, or a folder in its checkpoints/.
        to: Folder to write; must not exist.
        prompts: Prompts that the fresh process continues.
        sample_tokens: Length of each continuation.

    Raises:
        ExportError: If `to` exists, or the bundle does not give the trained model's logits.
        RunError: If there is no such run or no checkpoint.
        StorageError: If the disk refuses.
    """
    if to.exists():
        raise ExportError(
            f"{to} exists already; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    trained = find_trained(run_or_checkpoint)
    if trained is None:
        raise RunError(
            f"{run_or_checkpoint} is no run folder and no checkpoint of one.",
            allowed="A folder that `sparsify train` wrote, such as runs/quickstart, or a step-… folder in its checkpoints/.",
        )
    recipe = trained.run.load_recipe()
    with atomic_folder(to) as partial:
        _write_model(trained, partial)
        _write_history(trained, partial)
        acceptance = accept(
            partial,
            recipe.activation.ffn_activation,
            recipe.training.precision,
            trained.checkpoint / REFERENCE,
            prompts,
            sample_tokens,
        )
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Bundle(to, len(files), size_bytes, acceptance)


def _write_model(trained: Trained, folder: Path) -> None:
    model = load_trained(trained)
    model.save_pretrained(folder, max_shard_size=SHARD_BYTES)
    write_config(model.config, folder, model.dtype)
    copy_tokenizer(trained.run.initial, folder)


def _write_history(trained: Trained, folder: Path) -> None:
    run = trained.run
    (folder / "training").mkdir()
    calibration = run.initial / RECORD
    for file in (
        run.recipe,
        run.mixture_lock,
        run.metrics,
        run.sparsity,
        run.environment,
        calibration,
    ):
        if file.is_file():
            shutil.copyfile(file, folder / "training" / file.name)
    shutil.copyfile(trained.checkpoint / STATE, folder / "training" / STATE)
    if run.report.is_dir():
        shutil.copytree(run.report, folder / "sparsity")
    (folder / "README.md").write_text(_model_card(trained), encoding="utf-8")


def _model_card(trained: Trained) -> str:
    recipe, state = trained.run.load_recipe(), read_state(trained.checkpoint)
    lock = read_lock(trained.run.mixture_lock)
    report = read_report(trained.run.report) if trained.run.report.is_dir() else None
    template = Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8")
    return (
        jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
        .from_string(template)
        .render(
            recipe=recipe,
            state=state,
            config=json.loads((trained.run.initial / "config.json").read_text()),
            origin=recipe.model.source or "random weights",
            zeros=report.product_zeros if report else None,
            report_tokens=report.num_tokens if report else 0,
            stages=stages(trained.run),
            has_control=trained.run.control.metrics.is_file(),
            sources=[
                {
                    "name": name,
                    "group": recipe.mixture.sources[name].group,
                    "share": source.token_share,
                    "tokens": state.drawn_windows.get(name, 0) * lock.window_tokens,
                }
                for name, source in lock.sources.items()
            ],
        )
    )
