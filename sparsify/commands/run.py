"""One variant of an experiment, from its recipe to its last checkpoint: conversion, data, training."""

from __future__ import annotations

import logging
import platform
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from filelock import FileLock, Timeout

from sparsify.commands import rank
from sparsify.commands.mixture import ingest_progress
from sparsify.conversion.convert import Converted, convert
from sparsify.conversion.source import read_checkpoint
from sparsify.errors import RecipeError, RunError
from sparsify.evaluation.request import suite_of
from sparsify.files import storage_errors, write_json
from sparsify.launch.feeder import Feeder, can_start, is_ready
from sparsify.launch.launcher import launch
from sparsify.launch.nodes import Nodes
from sparsify.methods.calibrated_checkpoint import convert_calibrated, read_record
from sparsify.methods.router import check_router
from sparsify.mixture.inspection import DroppedCounts
from sparsify.mixture.lock import check_lock, differences, read_lock, with_delivered, write_lock
from sparsify.mixture.sequences.held_out import ValidationSequences, mixture_calibration
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.mixture.tokens.ingest import Ingest
from sparsify.models import SparseConfig
from sparsify.recipe.compose import save_recipe
from sparsify.recipe.identity import DECIDING_SECTIONS, first_difference
from sparsify.recipe.recipe import Recipe, check_blend, check_teacher
from sparsify.recipe.sparsification import ActivationSection
from sparsify.runs.data import ingests_of, lock_of, open_sources
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import Shape, latest_checkpoint, read_state
from sparsify.training.checkpoints import newest_whole
from sparsify.training.engine import check_machine
from sparsify.training.kernels.liger import liger_sentence
from sparsify.training.kernels.liger_ops import PACKAGE as LIGER
from sparsify.training.resize import check_convertible, needs_conversion, resized
from sparsify.training.suite_results import suite_is_due, suite_is_logged

logger = logging.getLogger(__name__)

LOCK_SECONDS = 2.0
"""Ranks outlive a killed launcher by less than this."""
PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "numpy", "sparsify-lm")


def train_run(recipe: Recipe, run: RunFolder, nodes: Nodes | None = None) -> bool:
    """Trains one variant. Returns whether there was anything left to train.

    Args:
        recipe: The recipe.
        run: Its run folder.
        nodes: Connections of this machine to the others; None for a single node.

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
    with _only_one(run):
        return _train_alone(recipe, run, nodes)


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


def _train_alone(recipe: Recipe, run: RunFolder, nodes: Nodes | None) -> bool:
    check_machine(recipe)
    suite_of(recipe.eval)
    _open_run(recipe, run)
    if not run.initial.is_dir():
        converted = _convert(recipe, run.initial)
        logger.info(f"Model: {_describe(converted)}")
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
    if newest and saved and needs_conversion(saved.shape, now):
        check_convertible(newest, saved.shape, now)  # before anything is tokenised for it
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
            launch(run, rank, nodes or Nodes(recipe.launch), feeder.check)
        feeder.wait_until(is_ready)
    sources = open_sources(ingests)
    for source in sources.values():
        for note in DroppedCounts.of(source).notes:
            logger.info(note)
    lock = lock_of(recipe, sources)
    lock.accepted_changes = read_lock(run.mixture_lock).accepted_changes
    last = latest_checkpoint(run.checkpoints)
    assert last is not None
    write_lock(with_delivered(lock, read_state(last).drawn_sequences), run.mixture_lock)
    return True


def _open_run(recipe: Recipe, run: RunFolder) -> None:
    if run.mixture_lock.is_file():
        check_same(run.load_recipe(), recipe, run)
    elif run.initial.is_dir():
        # Nothing was trained from it, and the recipe may have changed.
        for folder in (run.teacher, run.initial):
            if folder.is_dir():
                shutil.rmtree(folder)
    save_recipe(recipe, run.recipe)
    write_json(run.environment, environment(recipe))


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
        return convert(recipe.model, recipe.activation, to, seed=seed, dtype=initial_dtype)

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
    """Writes the dense source next to `initial`, where distillation needs it and calibration has changed the weights."""
    needed = recipe.distillation.is_on and read_record(run.initial) is not None
    if needed and not run.teacher.is_dir():
        base = ActivationSection(*_base_activation(read_checkpoint(run.initial).config))
        seed, dtype = recipe.training.seed, torch.float32
        convert(recipe.model, base, run.teacher, seed=seed, dtype=dtype)


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
    check_blend(recipe, config["base_ffn_activation"])
    is_calibrated = read_record(run.initial) is not None
    check_teacher(recipe, _base_activation(config), is_calibrated=is_calibrated)
    check_context(recipe, config["max_position_embeddings"])


def check_context(recipe: Recipe, context: int) -> None:
    """Refuses sequences that are longer than the model's context.

    Raises:
        RecipeError: With both lengths.
    """
    if recipe.training.sequence_length > context:
        raise RecipeError(
            f"training.sequence_length is {recipe.training.sequence_length}, longer than the model's context.",
            allowed=f"At most {context} tokens for this model.",
            next_step=f"Set training.sequence_length={context} or less.",
        )


def _lock_data(recipe: Recipe, run: RunFolder, ingests: Mapping[str, Ingest]) -> None:
    lock = lock_of(recipe, open_sources(ingests))
    if run.mixture_lock.is_file():
        before = read_lock(run.mixture_lock)
        if not recipe.launch.accept_changed_data:
            check_lock(before, lock)
        lock.accepted_changes = before.accepted_changes + differences(before, lock)
    else:
        parts = (
            f"{name} {source.token_share:.1%}"
            + (f" ({source.epochs:.2f} epochs)" if source.epochs else " (still being tokenised)")
            for name, source in lock.sources.items()
        )
        logger.info("Data: " + ", ".join(parts))
    write_lock(lock, run.mixture_lock)
