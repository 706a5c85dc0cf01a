"""Checkpoints: DeepSpeed's shards beside JSON that a person can read, written whole or not at all.

checkpoints/
  latest                        name of the newest whole checkpoint
  step-00001200/
    manifest.json               name, size and hash of every other file
    state.json                  counters, number of processes, ZeRO stage
    reference.safetensors       what the live model answered to a fixed input: exports are held against it
    mp_rank_00_…, *zero_pp_…    DeepSpeed's shards
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sparsify.errors import RunError
from sparsify.files import replace_folder, storage_errors, write_json, write_text
from sparsify.recipe.recipe import CheckpointSection
from sparsify.runs.manifest import damage, sync_folder, write_manifest
from sparsify.training.engine import prepare_accelerator
from sparsify.training.resize import (
    CONVERSIONS,
    Shape,
    check_convertible,
    conversion_folder,
    needs_conversion,
    universal_loading,
)

LATEST = "latest"
STATE = "state.json"
REFERENCE = "reference.safetensors"
HIDDEN = (".partial-*", ".step-*", CONVERSIONS)
"""What no longer serves after a save: remains of a run that was killed meanwhile, and what a resized run began from."""


@dataclass(frozen=True)
class TrainingState:
    """Everything that goes on from one step to the next besides the engine's own tensors."""

    step: int
    seen_tokens: int
    processes: int
    zero_stage: int
    drawn_windows: dict[str, int]
    """Windows of each source so far: what was delivered, and where the schedule goes on without counting anew."""
    recent_losses: list[dict[str, float] | None] = field(default_factory=list)
    """Loss of each source at the newest steps, None where a step was bad: what the next step is judged by."""
    left_out_windows: list[list[int]] = field(default_factory=list)
    """First and last window of each range that did not go into the weights, because its steps were bad or taken back."""
    hungry_steps: list[list[int]] = field(default_factory=list)
    """For how many steps in a row each expert of each layer has had too few tokens; empty without experts."""
    control: dict[str, float] = field(default_factory=dict)
    """Where the loop stands that ends at `sparsity.target_zeros` (`sparsify.methods.penalty.Control`); empty without one."""
    refits: int = 0
    """How many of `swap.refit_milestones` the weights have gone through; the activation in force follows from it."""

    @property
    def shape(self) -> Shape:
        return Shape(self.processes, self.zero_stage)


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay on the disk.

    Args:
        last: How many of the newest.
        every_tokens: Besides them, the one at each multiple of so many tokens; None for no others.
        step_tokens: Tokens of one step.
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
    """A checkpoint that is on the disk."""

    path: Path
    size_bytes: int


def crosses(every_tokens: int, seen_tokens: int, step_tokens: int) -> bool:
    """Whether the step that ended at `seen_tokens` crossed a multiple of `every_tokens`."""
    return seen_tokens // every_tokens > (seen_tokens - step_tokens) // every_tokens


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after this many steps."""
    return f"step-{step:08d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when there is none yet. Only its being there is looked at.

    Raises:
        RunError: If `latest` names a checkpoint that is not there.
    """
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    path = checkpoints / pointer.read_text().strip()
    if not (path / STATE).is_file():
        raise RunError(
            f"{pointer} names {path.name}, which is not there or not whole.",
            next_step=f"Write the name of another folder in {checkpoints} into {pointer.name}.",
        )
    return path


def newest_whole(checkpoints: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is as it was written, or None when nothing was saved yet.

    Reads the whole of it. Where a damaged one is passed over, `latest` is set back, so that all ranks go on from the
    same.

    Args:
        checkpoints: Folder of the run's checkpoints.
        say: Told about each checkpoint that is passed over.

    Raises:
        RunError: If none is whole.
    """
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return None
    named = pointer.read_text().strip()
    earlier = sorted((path.name for path in checkpoints.glob("step-*")), reverse=True)
    passed_over = []
    for name in [named, *(name for name in earlier if name < named)]:
        path = checkpoints / name
        reason = damage(path) or _unreadable_state(path)
        if reason is None:
            for other, what in passed_over:
                say(f"Checkpoint {other} is damaged: {what}. Going on from {name}, the one before.")
            if passed_over:
                write_text(pointer, name + "\n")
            return path
        passed_over.append((name, reason))
    raise RunError(
        f"No checkpoint in {checkpoints} is whole: "
        + "; ".join(f"{name or 'latest'}: {what}" for name, what in passed_over)
        + ".",
        next_step=f"Restore one from a copy, or remove {checkpoints} to train from the beginning.",
    )


def _unreadable_state(checkpoint: Path) -> str | None:
    try:
        read_state(checkpoint)
    except RunError as error:
        return error.given
    return None


def read_state(checkpoint: Path) -> TrainingState:
    """Reads a checkpoint's counters.

    Raises:
        RunError: If they are missing or damaged.
    """
    try:
        return TrainingState(**json.loads((checkpoint / STATE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(checkpoint, f"{STATE}: {error}") from error


def _damaged(checkpoint: Path, reason: str) -> RunError:
    return RunError(
        f"{checkpoint} is not whole: {reason}.",
        next_step=f"Write the name of another checkpoint into {checkpoint.parent / LATEST}.",
    )


@contextmanager
def _unreadable_shards(checkpoint: Path) -> Iterator[None]:
    """Says which checkpoint it is when torch meets a shard that is missing or was cut off."""
    try:
        yield
    except (OSError, EOFError, pickle.UnpicklingError, RuntimeError) as error:
        said = str(error)
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in said:
            raise
        raise _damaged(checkpoint, said.partition("\n")[0]) from error


def save(
    engine: Any,
    state: TrainingState,
    checkpoints: Path,
    keep: Keep,
    reference: dict[str, torch.Tensor],
) -> Saved:
    """Saves a checkpoint; every rank calls it. `latest` moves only after all of it is on disk.

    Args:
        engine: The DeepSpeed engine.
        state: Counters after the last finished step.
        checkpoints: Folder of the run's checkpoints.
        keep: Which checkpoints stay; the others are removed afterwards.
        reference: Tensors that rank 0 stores as reference.safetensors.

    Raises:
        StorageError: If the disk is full or refuses; the checkpoint before stays the latest.
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


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    """Gives a full disk its space back: the logs stand on it too, and have to say what went wrong."""
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
    for path in {*checkpoints.glob("step-*"), *hidden} - set(kept):
        shutil.rmtree(path, ignore_errors=True)


def load(engine: Any, checkpoint: Path) -> TrainingState:
    """Loads weights and optimiser state into an engine; every rank calls it.

    Where the checkpoint was written by another number of processes or ZeRO stage, its conversion is loaded, which the
    launcher made (`sparsify.training.resize.resized`). It stays until the next save: till then it may be asked for again.

    Raises:
        RunError: If it is damaged, or has not been converted.
    """
    state = read_state(checkpoint)
    now = Shape(dist.get_world_size(), engine.zero_optimization_stage())
    if not needs_conversion(state.shape, now):
        _load_shards(engine, checkpoint)
        return state
    check_convertible(checkpoint, state.shape, now)
    conversion = conversion_folder(checkpoint)
    if not conversion.is_dir():
        raise RunError(
            f"{checkpoint} was written by {state.shape}; this run has {now}, and nothing converted it.",
            next_step="Start the run with `sparsify train`.",
        )
    with universal_loading(engine):
        _load_shards(engine, conversion / checkpoint.name)
    return state


def _load_shards(engine: Any, folder: Path) -> None:
    with _unreadable_shards(folder):
        loaded, _ = engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_lr_scheduler_states=False
        )
    if loaded is None:
        raise _damaged(folder, "DeepSpeed found nothing to load in it")


class StoredTensor(Protocol):
    """A tensor that is still on the disk."""

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        ...

    def contiguous(self) -> torch.Tensor:
        """Reads it."""
        ...


def consolidated_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """Finds the trained weights in a run's own shards, without an engine. A tensor is read when it is asked for.

    Returns:
        Tensors by the model's parameter names: the live weights for ZeRO 0 to 2; for ZeRO 3 the fp32 master weights,
        which the live ones are rounded from.

    Raises:
        RunError: If a shard is missing or damaged.
    """
    prepare_accelerator()  # unpickling imports DeepSpeed, which else announces the accelerator it found
    whole_model = read_state(checkpoint).zero_stage < 3
    shard = checkpoint / "mp_rank_00_model_states.pt"
    reason = damage(checkpoint, {shard.name} if whole_model else None)
    if reason is not None:
        raise _damaged(checkpoint, reason)
    if whole_model:
        # DeepSpeed's own shard of the user's own run: the one pickle that is trusted here.
        with _unreadable_shards(checkpoint):
            return torch.load(shard, map_location="cpu", mmap=True, weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    unheard = io.StringIO()
    with _unreadable_shards(checkpoint), redirect_stdout(unheard), redirect_stderr(unheard):
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True
        )
    assert weights is not None
    return weights
