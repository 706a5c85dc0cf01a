"""The export bundle: one folder that loads offline with transformers alone and records how it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import GenerationConfig

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.source import read_checkpoint
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer
from sparsify.errors import ExportError, ModelError, RunError, check_choice
from sparsify.export.card import card_evaluations, model_card, read_evaluations
from sparsify.export.check import RECORDED_FILE, REFERENCE_FILE, Acceptance, Recorded, accept
from sparsify.export.weight_shards import DTYPES, write_shards, write_sums
from sparsify.files import atomic_folder, write_json
from sparsify.methods.calibrated_checkpoint import RECORD
from sparsify.models import SparseConfig
from sparsify.predictors import Predictors, read_predictors, write_predictors
from sparsify.predictors.format import FACTS_FILE, fingerprint_of
from sparsify.runs.load import Trained, find_trained
from sparsify.runs.state import REFERENCE, STATE, StoredTensor, consolidated_weights

PREDICTORS_FOLDER = "predictors"
GENERATION_FILE = "generation_config.json"
GB = 10**9


@dataclass(frozen=True)
class BundleSettings:
    """Settings of a bundle.

    Attributes:
        dtype: A key of DTYPES; None for the training dtype.
        shard_gb: Maximum shard size in GB.
        predictors: Folder of predictors; None for those in the run's folder, if they fit the checkpoint.
        license: Licence identifier of the base model for the card; None for the one in the base model's card.
        evaluations: Result folders of `sparsify evaluate` on this checkpoint, for the card.
        checked: Whether a fresh process loads the bundle, which needs memory for the whole model.
    """

    dtype: str | None = None
    shard_gb: float = 5.0
    predictors: Path | None = None
    license: str | None = None
    evaluations: Sequence[Path] = ()
    checked: bool = True


@dataclass(frozen=True)
class Bundle:
    """A bundle that was written; `acceptance` is None if it was not checked."""

    folder: Path
    num_files: int
    size_bytes: int
    acceptance: Acceptance | None
    has_predictors: bool


def export(
    run_or_checkpoint: Path,
    to: Path,
    prompts: Sequence[str] = (),
    sample_tokens: int = 48,
    settings: BundleSettings | None = None,
) -> Bundle:
    """Writes the bundle of a run's newest checkpoint, or of one checkpoint, and checks it before moving it into place.

    Args:
        run_or_checkpoint: Run folder, or a folder in its checkpoints/.
        to: Output folder; must not exist.
        prompts: Prompts that the fresh process continues.
        sample_tokens: Length of each continuation in tokens.
        settings: The settings; None for the defaults.

    Raises:
        EvaluationError: If an evaluation cannot be read.
        ExportError: If `to` exists, an evaluation is of other weights, or the bundle's logits differ from the trained model's.
        ModelError: If the given predictors belong to another checkpoint.
        RunError: If the run or the checkpoint does not exist.
        StorageError: If writing fails.
    """
    settings = settings or BundleSettings()
    trained = _checked(run_or_checkpoint, to, settings)
    recipe = trained.run.load_recipe()
    precision = recipe.training.precision
    dtype = settings.dtype or precision
    weights = consolidated_weights(trained.checkpoint)
    predictors = _predictors(trained, weights, settings.predictors)
    found = read_evaluations(settings.evaluations, trained, predictors)
    shown = card_evaluations(recipe.name, found) if found else None
    with atomic_folder(to) as partial:
        _write_model(trained, weights, partial, dtype, settings)
        if predictors is not None:
            write_predictors(predictors, partial / PREDICTORS_FOLDER)
        _write_history(trained, partial)
        acceptance = None
        if settings.checked:
            acceptance = accept(
                partial,
                recipe.activation.ffn_activation,
                [precision, dtype],
                trained.checkpoint / REFERENCE,
                prompts,
                sample_tokens,
            )
        _record(trained, acceptance, dtype, partial)
        facts = predictors.facts if predictors else None
        card = model_card(trained, dtype, acceptance, facts, settings.license, shown)
        (partial / "README.md").write_text(card, encoding="utf-8")
        files = write_sums(partial)
        size_bytes = sum(file.stat().st_size for file in files)
    return Bundle(to, len(files), size_bytes, acceptance, predictors is not None)


def _checked(run_or_checkpoint: Path, to: Path, settings: BundleSettings) -> Trained:
    if to.exists():
        raise ExportError(
            f"{to} already exists; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )
    if settings.dtype is not None:
        check_choice("--dtype", settings.dtype, tuple(DTYPES))
    if not settings.shard_gb > 0:
        raise ExportError(f"--shard-gb is {settings.shard_gb:g}.", allowed="Above 0.")
    trained = find_trained(run_or_checkpoint)
    if trained is None:
        raise RunError(
            f"{run_or_checkpoint} is neither a run folder nor a checkpoint of a run.",
            allowed="A folder that `sparsify train` wrote, e.g. runs/quickstart, or a step-… folder in its checkpoints/.",
        )
    return trained


def _predictors(trained: Trained, weights: dict[str, StoredTensor], given: Path | None) -> Predictors | None:
    folder = given or trained.run.path / PREDICTORS_FOLDER
    if given is None and not (folder / FACTS_FILE).is_file():
        return None
    predictors = read_predictors(folder)
    names = [name for name in weights if name.endswith(("gate_proj.weight", "gate_up_proj"))]
    gates = (weights[name].contiguous() for name in names)
    try:
        predictors.check_fingerprint(fingerprint_of(gates), str(folder))
    except ModelError:
        if given is not None:
            raise
        return None  # they belong to an earlier checkpoint of the run
    return predictors


def _config(trained: Trained) -> SparseConfig:
    initial, recipe = trained.run.initial, trained.run.load_recipe()
    kept = read_checkpoint(initial).config
    return sparse_config(kept, recipe.activation.ffn_activation, str(initial))


def _write_model(
    trained: Trained,
    weights: dict[str, StoredTensor],
    folder: Path,
    dtype: str,
    settings: BundleSettings,
) -> None:
    config, initial = _config(trained), trained.run.initial
    write_shards(weights, config, folder, DTYPES[dtype], int(settings.shard_gb * GB))
    write_config(config, folder, DTYPES[dtype])
    if (initial / GENERATION_FILE).is_file():
        shutil.copyfile(initial / GENERATION_FILE, folder / GENERATION_FILE)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    copy_tokenizer(initial, folder)


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
    shutil.copyfile(trained.checkpoint / REFERENCE, folder / "training" / REFERENCE_FILE)
    if run.report.is_dir():
        shutil.copytree(run.report, folder / "sparsity")


def _record(trained: Trained, acceptance: Acceptance | None, dtype: str, folder: Path) -> None:
    recipe = trained.run.load_recipe()
    recorded = Recorded(
        checkpoint=trained.checkpoint.name,
        ffn_activation=recipe.activation.ffn_activation,
        precision=recipe.training.precision,
        dtype=dtype,
        logits_difference=acceptance.logits_difference if acceptance else None,
        zeros=acceptance.zeros if acceptance else None,
        reference_tokens=acceptance.reference_tokens if acceptance else 0,
    )
    write_json(folder / "training" / RECORDED_FILE, recorded.model_dump())
