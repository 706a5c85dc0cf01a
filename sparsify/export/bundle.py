"""The export bundle: one folder that loads offline with transformers alone and records how it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import copy_tokenizer, set_chat_template
from sparsify.conversion.weight_zeros import TensorReader, count_zeros, lost_zeros, weight_sparsity
from sparsify.errors import ExportError, ModelError, RunError, check_choice
from sparsify.export.card import card_evaluations, model_card, read_evaluations
from sparsify.export.check import RECORDED_FILE, REFERENCE_FILE, Acceptance, Recorded, accept
from sparsify.export.quantised_bundle import is_quantised_folder, write_quantised
from sparsify.export.weight_shards import DTYPES, write_shards, write_sums
from sparsify.files import atomic_folder, write_json
from sparsify.methods.calibrated_checkpoint import RECORD
from sparsify.mixture.lock import read_lock
from sparsify.models import SparseConfig
from sparsify.predictors import PredictorFacts, Predictors, read_predictors, write_predictors
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
    predictors: PredictorFacts | None


def export(
    run_or_checkpoint: Path,
    to: Path,
    prompts: Sequence[str] = (),
    sample_tokens: int = 48,
    settings: BundleSettings | None = None,
) -> Bundle:
    """Writes the bundle of a run's newest checkpoint, of one checkpoint, or of a quantised model, and checks it before moving it into place.
    Raises ExportError if `to` exists, an evaluation is of other weights, or the bundle's logits differ from the trained
    model's; ModelError if the predictors belong to another checkpoint; RunError if there is no such run.
    """
    settings = settings or BundleSettings()
    if is_quantised_folder(run_or_checkpoint):
        return _export_quantised(run_or_checkpoint, to, prompts, sample_tokens, settings)
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
    return Bundle(to, len(files), size_bytes, acceptance, facts)


def _export_quantised(
    folder: Path, to: Path, prompts: Sequence[str], sample_tokens: int, settings: BundleSettings
) -> Bundle:
    _refuse_existing(to)
    plain = BundleSettings(license=settings.license, checked=settings.checked)
    other = [name for name, value in vars(settings).items() if value and value != getattr(plain, name)]
    if other:
        raise ExportError(
            f"{', '.join(other)} would be ignored: {folder} is a quantised model, whose integers are exported as they are.",
            next_step="Omit it.",
        )
    acceptance, num_files, size_bytes = write_quantised(
        str(folder),
        to,
        prompts=prompts,
        sample_tokens=sample_tokens,
        license=settings.license,
        checked=settings.checked,
    )
    return Bundle(to, num_files, size_bytes, acceptance, None)


def _refuse_existing(to: Path) -> None:
    if to.exists():
        raise ExportError(
            f"{to} already exists; an export never overwrites.",
            next_step="Choose another folder with --to, or remove this one.",
        )


def _checked(run_or_checkpoint: Path, to: Path, settings: BundleSettings) -> Trained:
    _refuse_existing(to)
    if settings.dtype is not None:
        check_choice("--dtype", settings.dtype, tuple(DTYPES))
    if not settings.shard_gb > 0:
        raise ExportError(f"--shard-gb is {settings.shard_gb:g}.", allowed="Above 0.")
    trained = find_trained(run_or_checkpoint)
    if trained is None:
        raise RunError(
            f"{run_or_checkpoint} is neither a run folder nor a checkpoint of a run.",
            allowed="A folder that `sparsify train` wrote, e.g. runs/quickstart, a step-… folder in its checkpoints/, or a quantised model.",
        )
    check_links(trained)
    return trained


def check_links(trained: Trained) -> None:
    """Refuses a run with links out of its folder: an export would publish whatever they lead to.

    Raises:
        ExportError: Naming the first.
    """
    run, checkpoint = trained.run, trained.checkpoint
    roots = [run.path.resolve(), checkpoint.resolve()]
    copied = [run.recipe, run.mixture_lock, run.metrics, run.sparsity, run.environment, run.initial, run.report]
    for path in [*copied, *run.initial.glob("*"), *run.report.rglob("*"), *checkpoint.glob("*")]:
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise ExportError(
                f"{path} is a link to {path.resolve()}, which is not in the run's folder and would be published.",
                next_step="If that file belongs to the run, replace the link by a copy.",
            )


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


def trained_config(trained: Trained) -> SparseConfig:
    """The configuration of a run's model."""
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
    config, initial = trained_config(trained), trained.run.initial
    write_shards(weights, config, folder, DTYPES[dtype], int(settings.shard_gb * GB))
    write_config(config, folder, DTYPES[dtype])
    _check_zeros(trained, config, folder)
    if (initial / GENERATION_FILE).is_file():
        shutil.copyfile(initial / GENERATION_FILE, folder / GENERATION_FILE)
    else:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    copy_tokenizer(initial, folder)
    template = read_lock(trained.run.mixture_lock).chat_template
    if template is not None:
        set_chat_template(folder, template)


def _check_zeros(trained: Trained, config: SparseConfig, folder: Path) -> None:
    """Raises ExportError if sparse weights have not all the zeros that training started from."""
    if weight_sparsity(config) is None:
        return
    lost = lost_zeros(config, TensorReader(trained.run.initial), TensorReader(folder))
    if lost:
        name, count = next(iter(lost.items()))
        raise ExportError(
            f"{sum(lost.values()):,} weights that were zero where training began are not zero in {trained.checkpoint}; of them "
            f"{count:,} in {name}.",
            next_step="Export an earlier checkpoint of the run, and find out what wrote to these weights.",
        )


def _num_zeros(folder: Path, config: SparseConfig) -> int | None:
    if weight_sparsity(config) is None:
        return None
    return sum(one.zeros for one in count_zeros(config, TensorReader(folder)))


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
        zero_weights=_num_zeros(folder, trained_config(trained)),
    )
    write_json(folder / "training" / RECORDED_FILE, recorded.model_dump())


PUBLISHING_ERRORS = (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, httpx.HTTPError, OSError)
PUBLISHING_NEEDS = "OWNER/NAME, with a token that can write there (`hf auth login`, or HF_TOKEN)."


def check_repository(repository: str, api: HfApi | None = None) -> None:
    """Refuses, before anything is exported, a repository that the bundle could not be published to.

    Raises:
        ExportError: If the name is not valid, the Hub is not reached, or the token is missing or of another owner.
    """
    try:
        validate_repo_id(repository)
        user = (api or HfApi()).whoami()
    except PUBLISHING_ERRORS as error:
        raise ExportError(
            f"--push-to-hub {repository} would fail: {str(error).strip().splitlines()[0]}",
            allowed=PUBLISHING_NEEDS,
            next_step="Correct it, or omit --push-to-hub; `hf upload REPO FOLDER` publishes the bundle later.",
        ) from error
    owner, slash, _ = repository.partition("/")
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", []))]
    if slash and owner not in owners:
        raise ExportError(
            f"--push-to-hub {repository} would fail: the token is of {user['name']}.",
            allowed=f"Owners: {', '.join(owners)}.",
        )


def push_to_hub(bundle: Path, repository: str, *, private: bool = False, api: HfApi | None = None) -> str:
    """Uploads a bundle as one commit, so that no partial bundle is ever visible; returns the repository's URL."""
    api = api or HfApi()
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        # Not upload_folder, which splits large folders into several commits.
        api.create_commit(
            repo_id=address.repo_id,
            operations=[
                CommitOperationAdd(path.relative_to(bundle).as_posix(), path)
                for path in sorted(bundle.rglob("*"))
                if path.is_file()
            ],
            commit_message="Add the bundle that `sparsify export` wrote",
        )
    except PUBLISHING_ERRORS as error:
        raise ExportError(
            f"{bundle} was not published as {repository}: {str(error).strip().splitlines()[0]}",
            allowed=PUBLISHING_NEEDS,
            next_step="The bundle itself is complete; `hf upload REPO FOLDER` also publishes it.",
        ) from error
    return str(address)
