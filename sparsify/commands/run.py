"""One variant of an experiment, from its recipe to its last checkpoint: conversion, data, training."""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from sparsify.commands import rank
from sparsify.commands.mixture import ingest_progress
from sparsify.conversion.convert import Converted, convert
from sparsify.conversion.manifest import damage, known_files, recorded_files
from sparsify.conversion.source_checkpoint import is_hub_id, locate, read_checkpoint
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.conversion.weight_zeros import weight_sparsity
from sparsify.errors import RecipeError, RunError, UserError
from sparsify.evaluation.request import check_suite_code
from sparsify.export.check import RECORDED_FILE
from sparsify.files import (
    atomic_folder,
    clear_partial_files,
    clear_remains,
    refuse_foreign_folder,
    replace_folder,
    write_json,
)
from sparsify.launch.feeder import Feeder, can_start, is_ready
from sparsify.launch.launcher import launch
from sparsify.launch.nodes import Nodes
from sparsify.methods.base import check_layers, stored_by, upcycling_of
from sparsify.methods.calibrated_checkpoint import convert_calibrated
from sparsify.methods.distillation import has_own_teacher
from sparsify.methods.lte_training import check_routers
from sparsify.methods.router import check_router
from sparsify.mixture.inspection import DroppedCounts, loss_share
from sparsify.mixture.lock import Extension, check_lock, differences, read_lock, with_delivered, write_lock
from sparsify.mixture.sequences.held_out import ValidationSequences, mixture_calibration
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.mixture.sources.source_files import source_files
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import Ingest
from sparsify.models import SparseConfig
from sparsify.plan.estimate import check_context, local_config
from sparsify.recipe.compose import save_recipe
from sparsify.recipe.identity import DECIDING_SECTIONS, first_difference
from sparsify.recipe.recipe import Recipe, check_blend, check_teacher
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.data import ingests_of, lock_of, open_sources
from sparsify.runs.history import has_trained
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.run_lock import RunLock
from sparsify.runs.state import Shape, checkpoint_names, latest_checkpoint, read_state
from sparsify.sparsity.report import REPORT_FILE
from sparsify.training.checkpoints import newest_whole
from sparsify.training.deepspeed_engine import check_machine, learning_rate
from sparsify.training.kernels.liger import liger_sentence
from sparsify.training.kernels.liger_ops import PACKAGE as LIGER
from sparsify.training.resize import resized
from sparsify.training.suite_results import suite_is_due, suite_is_logged
from sparsify.training.tracker import check_tracker

logger = logging.getLogger(__name__)

CHECKPOINT_MARK = "ffn_activation.py"
"""A file that only our checkpoints have."""
BUNDLE_MARK = f"training/{RECORDED_FILE}"
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "sparsify-lm")


def train_run(recipe: Recipe, run: RunFolder, nodes: Nodes | None = None, converted: RunFolder | None = None) -> bool:
    """Trains one variant. Returns whether there was anything left to train.

    Args:
        recipe: The variant's.
        run: Its folder; what is there is continued.
        nodes: The machines; None for this one alone.
        converted: A run that begins with the same conversion, whose converted checkpoint is taken over where this one has none.

    Raises:
        RunError: If another process is training it now, or it was begun with other settings.
    """
    place = recipe.launch
    if nodes is None and (place.nodes > 1 or place.rendezvous or place.hostfile):
        raise RecipeError(
            f"launch.nodes is {place.nodes}, launch.rendezvous {place.rendezvous}, launch.hostfile {place.hostfile}.",
            allowed="Only `sparsify train` runs on several nodes.",
            next_step="Omit these settings.",
        )
    with RunLock(run.path) as lock:
        return _train_alone(recipe, run, nodes, lock, converted)


def _train_alone(
    recipe: Recipe, run: RunFolder, nodes: Nodes | None, lock: RunLock, converted: RunFolder | None
) -> bool:
    check_start(recipe, run)
    _open_run(recipe, run)
    if converted is not None and converted.initial.is_dir() and not run.initial.is_dir():
        with atomic_folder(run.initial) as partial_folder:
            shutil.copytree(converted.initial, partial_folder, dirs_exist_ok=True)
    is_calibrated = recipe.conversion.calibration_tokens > 0
    _repair(run, run.initial, None if is_calibrated else partial(_convert, recipe))
    if not run.initial.is_dir():
        logger.info(f"Model: {_describe(_convert(recipe, run.initial))}")
    if recipe.training.liger_kernels:
        logger.info(liger_sentence())
    _check_context(recipe, run)
    _keep_teacher(recipe, run)
    newest = newest_whole(run.checkpoints)
    saved = read_state(newest) if newest else None
    step = saved.step if saved else 0
    unasked = saved is not None and suite_is_due(recipe, saved) and not suite_is_logged(recipe, run, step)
    if step == recipe.num_steps and not unasked:
        logger.info(f"Trained already: {run.path}")
        return False
    now = Shape(recipe.launch.total_processes, recipe.engine.zero_stage)
    ingests = ingests_of(recipe, run)
    with Feeder(run, ingests, recipe.launch.ingest_processes, ingest_progress()) as feeder:
        feeder.wait_until(can_start)
        _lock_data(recipe, run, ingests)
        if step:
            logger.info(f"Continuing from step {step:,} of {recipe.num_steps:,}")
        with ExitStack() as stack:
            if newest and saved:
                log = run.logs / "convert.log"
                stack.enter_context(resized(newest, saved.shape, now, log))
            launch(run, rank, nodes or Nodes(recipe.launch), feeder.check, lock)
        feeder.wait_until(is_ready)
    sources = open_sources(ingests)
    for source in sources.values():
        for note in DroppedCounts.of(source, loss_share(source)).notes:
            logger.info(note)
    data = lock_of(recipe, sources)
    before = read_lock(run.mixture_lock)
    data.accepted_changes, data.extensions = before.accepted_changes, before.extensions
    last = latest_checkpoint(run.checkpoints)
    assert last is not None
    write_lock(with_delivered(data, read_state(last).drawn_sequences), run.mixture_lock)
    return True


def refuse_foreign_run(run: RunFolder) -> None:
    """Raises RunError or StorageError if a folder has what a run would overwrite or remove, and did not write."""
    names = (run.recipe, run.initial, run.teacher, run.checkpoints, run.metrics, run.report, run.export)
    found = [path.name for path in names if path.exists() or path.is_symlink()]
    if found and not run.is_ours:
        raise RunError(
            f"{run.path} has {', '.join(found)}, and no {run.environment.name} that says that `sparsify train` wrote it.",
            allowed="A new folder, or one that `sparsify train` made. Nothing was changed.",
            next_step="Choose another folder with run_dir=….",
        )
    for folder, marker, what in (
        (run.initial, CHECKPOINT_MARK, "converted checkpoint"),
        (run.teacher, CHECKPOINT_MARK, "converted checkpoint"),
        (run.report, REPORT_FILE, "sparsity report"),
        (run.export, BUNDLE_MARK, "export bundle"),
    ):
        refuse_foreign_folder(folder, marker, what)


def check_start(recipe: Recipe, run: RunFolder) -> None:
    """Refuses what cannot be trained, as far as that is known before anything is read, converted or started.

    Raises:
        UserError: On settings that this machine, the run folder, the source checkpoint or the files of the mixture contradict.
    """
    check_machine(recipe)
    check_tracker(recipe.tracking)
    check_suite_code(recipe.eval)
    refuse_foreign_run(run)
    if run.mixture_lock.is_file() and not _begins_again(recipe, run):
        check_resumable(run.load_recipe(), recipe, run)
        return
    for name, source in recipe.mixture.sources.items():
        source_files(name, source)
    for source in (recipe.model.source, recipe.model.dense_source):
        if source and not is_hub_id(source):
            locate(source)
    config = local_config(recipe.model) or recipe.model.architecture
    check_dense_source(recipe, config)
    if isinstance(context := config.get("max_position_embeddings"), int):
        check_context(recipe, context)
    if "model_type" in config and recipe.model.upcycle_experts is None and upcycling_of(recipe.conversion) is None:
        check_router(recipe, SimpleNamespace(**config))
        if recipe.conversion.makes_mask:
            config = config | {"sparsification": stored_by(recipe.conversion)}
        elif recipe.conversion.drop_source_mask:
            config = config | {"sparsification": None}
        check_routers(recipe, SimpleNamespace(**config))


def _begins_again(recipe: Recipe, run: RunFolder) -> bool:
    """Whether a run was begun with other settings, and stopped before it trained a step with them."""
    if not run.mixture_lock.is_file() or has_trained(run):
        return False
    before = run.load_recipe()
    try:
        check_resumable(before, recipe, run)
    except RunError:
        return True
    return False


def _open_run(recipe: Recipe, run: RunFolder) -> None:
    refuse_foreign_run(run)
    for folder in (run.initial, run.teacher, run.report, run.export):
        clear_remains(folder)
    clear_partial_files(run.path)
    write_json(run.environment, environment(recipe))  # first: it marks the folder as ours
    if _begins_again(recipe, run):
        logger.info(f"{run.path} was begun with other settings and trained no step with them: it begins again")
        run.mixture_lock.unlink()
    if not run.mixture_lock.is_file() and run.initial.is_dir():
        # Nothing was trained from it, and the recipe may have changed.
        for folder in (run.teacher, run.initial):
            if folder.is_dir():
                shutil.rmtree(folder)
    if run.mixture_lock.is_file():
        _extend(run.load_recipe(), recipe, run)
    save_recipe(recipe, run.recipe)


def _repair(run: RunFolder, folder: Path, make: Callable[[Path], object] | None) -> None:
    """Has a damaged folder of a run made again: removes it, or where the run has trained from it, replaces it by one with the
    same bytes. `make` writes it; None where that is not certain to give the same bytes.

    Raises:
        RunError: If the run has trained from it, and it cannot be made again.
    """
    reason = damage(folder) if folder.is_dir() else None
    if reason is None:
        return
    logger.warning(f"{folder} is damaged: {reason}. It is made again.")
    if not checkpoint_names(run.checkpoints):
        shutil.rmtree(folder)
        return
    why = "a calibration does not give the same bytes everywhere"
    if make is not None:
        again = folder.with_name(f"{folder.name}.again")
        shutil.rmtree(again, ignore_errors=True)
        try:
            make(again)
            same = recorded_files(again) == known_files(folder)
        except UserError as error:
            same, why = False, error.given
        else:
            why = "its source gives other files now"
        if same:
            replace_folder(again, folder)
            return
        shutil.rmtree(again, ignore_errors=True)
    raise RunError(
        f"{folder} is damaged: {reason}. It cannot be made again as it was: {why.rstrip('.')}.",
        allowed="The model that this run has trained from so far.",
        next_step="Restore the folder, or the source that the recipe names, from a copy. Or begin a new run with run_dir=….",
    )


def check_resumable(before: Recipe, now: Recipe, run: RunFolder) -> None:
    """Refuses to resume a run under other settings than it was begun with; only its budget may be longer.

    Raises:
        RunError: Naming the setting, with both values.
    """
    old, new = before.training.budget_tokens, now.training.budget_tokens
    if old == new:
        check_same(before, now, run)
        return
    same_budget = deepcopy(now)
    same_budget.training.budget_tokens = old
    check_same(before, same_budget, run)
    given = f"{run.path} was begun with training.budget_tokens={old}; this command says {new}."
    if new < old:
        trained = _trained_steps(run) * now.step_tokens
        raise RunError(
            f"{given} It has trained {trained:,} tokens already.",
            allowed=f"A run can be extended, not shortened: {old} or more.",
            next_step="Choose another folder with run_dir=….",
        )
    for setting, laid_out in {
        "blending.budget_share": now.blending.budget_share > 0,
        "penalty.stages": bool(now.penalty.stages),
        "penalty.target_zeros": now.penalty.target_zeros is not None,
        "mixture.phases": bool(now.mixture.phases),
    }.items():
        if laid_out:
            raise RunError(
                f"{given} {setting} is laid out over the budget.",
                allowed="Under another budget, what was trained already would have been trained otherwise.",
                next_step=f"Train on from its result: model.source={run.export} without {setting}, and run_dir=….",
            )


def _trained_steps(run: RunFolder) -> int:
    newest = latest_checkpoint(run.checkpoints)
    return read_state(newest).step if newest else 0


def _extend(before: Recipe, now: Recipe, run: RunFolder) -> None:
    """Notes a longer budget in the lock, before recipe.yaml says it, so that no kill in between loses it."""
    old, new = before.training.budget_tokens, now.training.budget_tokens
    if new == old:
        return
    lock, step = read_lock(run.mixture_lock), _trained_steps(run)
    if all(one.from_budget_tokens != old for one in lock.extensions):
        lock.extensions.append(Extension(step=step, from_budget_tokens=old, to_budget_tokens=new))
        write_lock(lock, run.mixture_lock)
    seen = step * now.step_tokens
    was, becomes = (learning_rate(one.optimizer, seen, one.num_steps * one.step_tokens) for one in (before, now))
    logger.info(
        f"Extended at step {step:,} from {old:,} to {new:,} tokens. The learning rate follows the schedule of the new budget: "
        f"{becomes:.3g} instead of {was:.3g} here. Every source continues behind its last sequence."
    )


def check_same(before: Recipe, now: Recipe, run: RunFolder) -> None:
    """Refuses to resume a run under other settings than it was begun with.

    Raises:
        RunError: Naming the first setting that differs, with both values.
    """
    if difference := first_difference(before, now):
        key, old, new = difference
        raise RunError(
            f"{run.path} was begun with {key}={old}; this command says {new}.",
            allowed=f"A run resumes only with what it began with in {', '.join(DECIDING_SECTIONS)}.",
            next_step="Choose another folder with run_dir=…, or remove this one.",
        )


def environment(recipe: Recipe) -> dict[str, Any]:
    packages = [*PACKAGES, *([LIGER] if recipe.training.liger_kernels else [])]
    return {
        "command": " ".join(["sparsify", *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: version(name) for name in packages},
    }


def _convert(recipe: Recipe, to: Path) -> Converted:
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else torch.float32
    # Random weights are drawn in fp32, so that both precisions start from the same values.
    initial_dtype = torch.float32 if recipe.model.init == "random" else dtype
    seed = recipe.training.seed
    if not recipe.conversion.calibration_tokens:
        drop_mask = recipe.conversion.drop_source_mask
        return convert(recipe.model, recipe.activation, to, seed=seed, dtype=initial_dtype, drop_mask=drop_mask)

    def sequences_for(tokenizer: Tokenizer, config: SparseConfig) -> tuple[list[PackedSequence], ValidationSequences]:
        check_context(recipe, config.max_position_embeddings)
        return mixture_calibration(
            recipe.mixture,
            tokenizer,
            num_tokens=recipe.conversion.calibration_tokens,
            validation_sequences=recipe.eval.validation_sequences_per_source,
            sequence_length=recipe.training.sequence_length,
            seed=seed,
            cache_dir=Path(recipe.cache_dir),
            on_progress=ingest_progress(),
        )

    converted, calibration = convert_calibrated(
        recipe.model,
        recipe.activation,
        recipe.conversion,
        to,
        sequences_for,
        seed=seed,
        dtype=initial_dtype,
    )
    if calibration is not None:
        stages = ", ".join(f"{stage.name} {stage.loss:.3f}" for stage in calibration.stages)
        logger.info(f"Calibrated on {calibration.num_tokens:,} tokens; held-out loss: {stages}")
    return converted


def _keep_teacher(recipe: Recipe, run: RunFolder) -> None:
    """Writes the dense source next to `initial`, where distillation needs it and training does not start from it."""
    if not (recipe.distillation.is_on and has_own_teacher(run)):
        return
    base = ActivationSection(*_base_activation(run.initial_config()))
    seed, dtype, drop_mask, model = recipe.training.seed, torch.float32, source_stores_mask(recipe, run), recipe.model
    if model.dense_source is not None:
        model, drop_mask = replace(model, source=model.dense_source, dense_source=None), False
    write = partial(convert, model, base, seed=seed, dtype=dtype, drop_mask=drop_mask)
    _repair(run, run.teacher, write)
    if not run.teacher.is_dir():
        write(run.teacher)
    _check_teacher_shape(recipe, run)


def check_dense_source(recipe: Recipe, config: Mapping[str, Any]) -> None:
    """Refuses a dense baseline and a teacher that would have a source's sparse weights.

    Args:
        recipe: What to train.
        config: config.json of the source, as far as it is known.

    Raises:
        RecipeError: Naming the setting.
    """
    model = recipe.model
    if model.dense_source is not None:
        other = weight_sparsity(local_config(replace(model, source=model.dense_source)) or {})
        if other is not None:
            raise RecipeError(f"model.dense_source={model.dense_source} is not dense: {other.words}.")
    sparse = weight_sparsity(config)
    wanted = "baseline.ffn_activation" if recipe.baseline.ffn_activation else "distillation"
    if sparse is None or model.dense_source or not (recipe.baseline.ffn_activation or recipe.distillation.is_on):
        return
    raise RecipeError(
        f"{wanted} is set, and {model.source} is not dense: {sparse.words}.",
        next_step="Say with model.dense_source which dense model it was made from, or set baseline.ffn_activation=null and no "
        "distillation.",
    )


def _check_teacher_shape(recipe: Recipe, run: RunFolder) -> None:
    own, teacher = run.initial_config(), read_checkpoint(run.teacher).config
    for key in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if own[key] != teacher[key]:
            raise RecipeError(
                f"model.dense_source={recipe.model.dense_source} has {key}={teacher[key]}, the model that is trained {own[key]}.",
                allowed="The dense model that model.source was made from.",
            )


def source_stores_mask(recipe: Recipe, run: RunFolder) -> bool:
    """Whether the source of a run stores a mask, which the run keeps or drops."""
    return recipe.conversion.drop_source_mask or run.has_source_mask


def _base_activation(config: dict[str, Any]) -> tuple[str, float]:
    return config["base_ffn_activation"], config["base_ffn_gate_threshold"]


def _describe(converted: Converted) -> str:
    config = converted.config
    shapes = read_checkpoint(converted.folder).shapes.values()
    num_parameters = sum(torch.Size(shape).numel() for shape in shapes)
    return (
        f"{converted.origin} as {config.model_type} with {config.ffn_activation}, "
        f"{num_parameters / 1e6:,.1f}M parameters, {config.num_hidden_layers} layers"
    )


def _check_context(recipe: Recipe, run: RunFolder) -> None:
    config = read_checkpoint(run.initial).config
    check_router(recipe, SimpleNamespace(**config))
    check_routers(recipe, SimpleNamespace(**config))
    check_layers(recipe, config["model_type"])
    if recipe.conversion.weight_sparsity is None:  # they are the source's own
        check_dense_source(recipe, config)
    check_blend(recipe, config["base_ffn_activation"])
    check_teacher(recipe, _base_activation(config), differs=has_own_teacher(run))
    context = config["max_position_embeddings"]
    check_context(recipe, context)
    tokenizer = load_tokenizer(run.initial)
    for number, prompt in enumerate(recipe.eval.sample_prompts):
        length = len(tokenizer(prompt)["input_ids"])  # pyright: ignore[reportArgumentType]
        if not 1 <= length < context:
            raise RecipeError(
                f"eval.sample_prompts.{number} has {length:,} tokens.",
                allowed=f"At least one, and fewer than the model's context, {context:,} tokens.",
            )


def _lock_data(recipe: Recipe, run: RunFolder, ingests: Mapping[str, Ingest]) -> None:
    lock = lock_of(recipe, open_sources(ingests))
    if run.mixture_lock.is_file():
        before = read_lock(run.mixture_lock)
        if not recipe.launch.accept_changed_data:
            check_lock(before, lock)
        lock.accepted_changes = before.accepted_changes + differences(before, lock)
        lock.extensions = before.extensions
    else:
        parts = (
            f"{name} {source.token_share:.1%}"
            + (f" ({source.epochs:.2f} epochs)" if source.epochs else " (still being tokenised)")
            for name, source in lock.sources.items()
        )
        logger.info("Data: " + ", ".join(parts))
    write_lock(lock, run.mixture_lock)
