"""Checkpoints: DeepSpeed's shards and JSON that a person can read, written whole or not at all.

checkpoints/
  latest                        name of the newest whole checkpoint
  step-00001200/
    manifest.json               name, size and hash of every other file
    state.json                  counters, number of processes, ZeRO stage
    reference.safetensors       the live model's logits for a fixed input: exports are compared with it
    mp_rank_00_…, *zero_pp_…    DeepSpeed's shards
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sparsify.conversion.manifest import MANIFEST, damage
from sparsify.errors import RunError
from sparsify.files import replace_folder, storage_errors, sync_folder, write_json, write_text
from sparsify.methods.live_model import Engine, evaluating
from sparsify.methods.objective import as_saved
from sparsify.recipe.training import CheckpointSection
from sparsify.runs.manifest import write_manifest
from sparsify.runs.shards import damaged_checkpoint, plain_shards
from sparsify.runs.state import (
    LATEST,
    REFERENCE,
    STATE,
    Shape,
    TrainingState,
    checkpoint_name,
    checkpoint_names,
    crosses,
    named_checkpoint,
    read_state,
)
from sparsify.training.resize import (
    CONVERSIONS,
    conversion_folder,
    needs_conversion,
    own_adam,
    universal_loading,
)
from sparsify.training.session import Session
from sparsify.training.universal import load_universal

logger = logging.getLogger(__name__)

REFERENCE_TOKENS = 32
HIDDEN = (".partial-step-*", ".step-*.replaced-*", CONVERSIONS)
"""What no longer serves after a save: remains of a run that was killed while it saved, and what a resized run began from."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on the disk.

    Args:
        every_tokens: Besides them, the one at each multiple of so many tokens; None for no others.
    """

    last: int
    every_tokens: int | None
    step_tokens: int

    @classmethod
    def of(cls, settings: CheckpointSection, step_tokens: int) -> Keep:
        return cls(settings.keep_last, settings.keep_every_tokens, step_tokens)

    def always(self, checkpoint: Path) -> bool:
        """Whether a checkpoint stays although it is not among the newest."""
        if self.every_tokens is None:
            return False
        try:
            seen_tokens = read_state(checkpoint).seen_tokens
        except RunError:
            return False
        return crosses(self.every_tokens, seen_tokens, self.step_tokens)


@dataclass(frozen=True)
class Saved:
    path: Path
    size_bytes: int


def newest_whole(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is as it was written, or None when nothing was saved yet.

    Reads the whole of it. Where a damaged one is passed over, or `latest` names none, `latest` is written again, so that
    all ranks resume from the same.

    Raises:
        RunError: If there are checkpoints and none is whole.
    """
    pointer = checkpoints / LATEST
    if pointer.exists() and not pointer.is_file():
        aside = pointer.with_name(f"{LATEST}.set-aside-{time.time_ns()}")
        logger.warning(f"{pointer} is not a file; it is now {aside.name}.")
        pointer.rename(aside)
    named, names = named_checkpoint(checkpoints), checkpoint_names(checkpoints)
    candidates = names
    if named is not None:
        # Later ones are of a course that was given up when `latest` was set back.
        later = [name for name in names if name > named]
        candidates = [named, *(name for name in names if name < named), *later]
    elif names:
        logger.warning(f"{pointer} names no checkpoint: looking for the newest whole one in {checkpoints}.")
    passed_over = []
    for name in candidates:
        path = checkpoints / name
        reason = damage(path) or _unreadable_state(path)
        if reason is None:
            for other, what in passed_over:
                place = "the one before" if name < other else "which is later"
                logger.warning(f"Checkpoint {other} is damaged: {what}. Continuing from {name}, {place}.")
            if named is None:
                logger.warning(f"Continuing from {name}, the newest whole checkpoint.")
            if name != named:
                write_text(pointer, name + "\n")
            return path
        passed_over.append((name, reason))
    if not passed_over:
        return None
    raise RunError(
        f"No checkpoint in {checkpoints} is whole: " + "; ".join(f"{name}: {what}" for name, what in passed_over) + ".",
        next_step=f"Restore one from a copy, or remove {checkpoints} to train from the beginning.",
    )


def _unreadable_state(checkpoint: Path) -> str | None:
    try:
        read_state(checkpoint)
    except RunError as error:
        return error.given
    return None


def save(
    engine: Engine,
    state: TrainingState,
    checkpoints: Path,
    keep: Keep,
    reference: dict[str, torch.Tensor],
) -> Saved:
    """Saves a checkpoint after the last finished step, with `reference` from rank 0; every rank calls it. `latest`
    moves only after all of it is on disk: on a StorageError the checkpoint before stays the latest.
    """
    final = checkpoints / checkpoint_name(state.step)
    partial = checkpoints / f".partial-{final.name}"
    with storage_errors(final), _removed_on_failure(partial):
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        engine.save_checkpoint(str(checkpoints), tag=partial.name, save_latest=False)
        dist.barrier()
        if dist.get_rank() == 0:
            save_file(reference, partial / REFERENCE)
            write_json(partial / STATE, asdict(state))
        dist.barrier()
        size_bytes = write_manifest(partial)
        if dist.get_rank() == 0:
            replace_folder(partial, final)
            sync_folder(checkpoints)
            write_text(checkpoints / LATEST, final.name + "\n")
            sync_folder(checkpoints)
            _prune(checkpoints, keep, final.name)
        dist.barrier()
    return Saved(final, size_bytes)


def save_session(session: Session) -> None:
    """Saves the session's state, unless the newest checkpoint holds it already; every rank calls it."""
    if session.saved is session.state:  # stopped before a step could be trained
        return
    started = time.monotonic()
    recipe = session.recipe
    for objective in session.objectives:
        objective.before_save()
    reference = _reference(session)
    # Counted only here: for shares without a short period it takes a moment, which no step should wait for.
    drawn = session.reader.schedule.counts(session.state.step * recipe.training.global_batch_size)
    session.state = replace(
        session.state,
        drawn_sequences=drawn,
        processes=dist.get_world_size(),
        zero_stage=recipe.engine.zero_stage,
    )
    keep = Keep.of(recipe.checkpoint, recipe.step_tokens)
    saved = save(session.engine, session.state, session.run.checkpoints, keep, reference)
    session.saved = session.state
    seconds = time.monotonic() - started
    session.record(
        "checkpoint",
        f"saved {saved.path} ({saved.size_bytes / 1e6:.0f} MB, {seconds:.1f} s)",
        bytes=saved.size_bytes,
        seconds=round(seconds, 3),
    )


@torch.no_grad()
def _reference(session: Session) -> dict[str, torch.Tensor]:
    """The live model's logits for the first held-out sequence, as the loaded checkpoint will compute them.

    Every rank computes it, which ZeRO-3 needs.
    """
    sequence = next(iter(session.held_out.values()))[0]
    input_ids = torch.from_numpy(sequence.input_ids[:REFERENCE_TOKENS].copy())[None].to(session.engine.device)
    with evaluating(session.engine), as_saved(session.objectives):
        logits = session.engine(input_ids=input_ids, use_cache=False).logits
    return {"input_ids": input_ids.cpu(), "logits": logits.float().cpu()}


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _prune(checkpoints: Path, keep: Keep, newest: str) -> None:
    saved = sorted(path for path in checkpoints.glob("step-*") if (path / STATE).is_file())
    # Later steps than the newest are of a course that was given up when `latest` was set back.
    earlier = [path for path in saved if path.name <= newest]
    kept = earlier[-keep.last :] + [path for path in earlier if keep.always(path)]
    hidden = (path for pattern in HIDDEN for path in checkpoints.glob(pattern))
    ours = (checkpoints / name for name in checkpoint_names(checkpoints) if _is_ours(checkpoints / name))
    for path in {*ours, *hidden} - set(kept):
        shutil.rmtree(path, ignore_errors=True)


def _is_ours(checkpoint: Path) -> bool:
    """Whether a folder with a checkpoint's name holds one, or nothing."""
    files = {path.name for path in checkpoint.iterdir()} if checkpoint.is_dir() else set()
    return not files or bool(files & {MANIFEST, STATE, "mp_rank_00_model_states.pt"})


def load(engine: Engine, checkpoint: Path) -> TrainingState:
    """Loads weights and optimiser state into an engine; every rank calls it.

    Where the checkpoint was written by another number of processes or ZeRO stage, its conversion is loaded, which the
    launcher made (`sparsify.training.resize.resized`). It stays until the next save: until then it may be needed again.

    Raises:
        RunError: If it is damaged, or has not been converted.
    """
    state = read_state(checkpoint)
    now = Shape(dist.get_world_size(), engine.zero_optimization_stage())
    if not needs_conversion(state.shape, now):
        _load_shards(engine, checkpoint)
        return state
    conversion = conversion_folder(checkpoint)
    if not conversion.is_dir():
        raise RunError(
            f"{checkpoint} was written by {state.shape}; this run has {now}, and nothing converted it.",
            next_step="Start the run with `sparsify train`.",
        )
    if now.zero_stage == 0:
        load_universal(engine, conversion / checkpoint.name)
        return state
    with universal_loading(engine):
        _load_shards(engine, conversion / checkpoint.name)
    return state


def _load_shards(engine: Engine, folder: Path) -> None:
    is_wrapped = engine.zero_optimization_stage() > 0
    with plain_shards(folder), own_adam(engine) if is_wrapped else nullcontext():
        loaded, _ = engine.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
    if loaded is None:
        raise damaged_checkpoint(folder, "DeepSpeed found nothing to load in it")
