"""Checkpoints: DeepSpeed's shards beside JSON that a person can read, written whole or not at all.

checkpoints/
  latest                        name of the newest whole checkpoint
  step-00001200/
    state.json                  counters, number of processes, ZeRO stage
    reference.safetensors       what the live model answered to a fixed input: exports are held against it
    mp_rank_00_…, *zero_pp_…    DeepSpeed's shards
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sparsify.errors import RunError
from sparsify.files import storage_errors, write_json, write_text
from sparsify.training.engine import prepare_accelerator

LATEST = "latest"
STATE = "state.json"
REFERENCE = "reference.safetensors"


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


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after this many steps."""
    return f"step-{step:08d}"


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, or None when there is none yet.

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
    keep_last: int,
    reference: dict[str, torch.Tensor],
) -> Path:
    """Saves a checkpoint; every rank calls it. `latest` moves only after all of it is on disk.

    Args:
        engine: The DeepSpeed engine.
        state: Counters after the last finished step.
        checkpoints: Folder of the run's checkpoints.
        keep_last: Newest checkpoints to keep; older ones are removed afterwards.
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
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            write_text(checkpoints / LATEST, final.name + "\n")
            _prune(checkpoints, keep_last, final.name)
        dist.barrier()
    return final


@contextmanager
def _removed_on_failure(partial: Path) -> Iterator[None]:
    """Gives a full disk its space back: the logs stand on it too, and have to say what went wrong."""
    try:
        yield
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _prune(checkpoints: Path, keep_last: int, newest: str) -> None:
    saved = sorted(path for path in checkpoints.glob("step-*") if (path / STATE).is_file())
    kept = [path for path in saved if path.name <= newest][-keep_last:]
    # Later steps than the newest are of a course that was given up when `latest` was set back.
    for path in (set(saved) - set(kept)) | set(checkpoints.glob(".partial-*")):
        shutil.rmtree(path, ignore_errors=True)


def load(engine: Any, checkpoint: Path) -> TrainingState:
    """Loads weights and optimiser state into an engine of the same shape; every rank calls it.

    Raises:
        RunError: If the checkpoint was written by another number of processes or ZeRO stage.
    """
    state = read_state(checkpoint)
    now = (dist.get_world_size(), engine.zero_optimization_stage())
    if (state.processes, state.zero_stage) != now:
        raise RunError(
            f"{checkpoint} was written by {state.processes} process(es) at ZeRO stage {state.zero_stage}; "
            f"this run has {now[0]} at stage {now[1]}.",
            next_step=f"Go on with launch.processes={state.processes} engine.zero_stage={state.zero_stage}, "
            "or start another run with run_dir=….",
        )
    with _unreadable_shards(checkpoint):
        loaded, _ = engine.load_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, load_lr_scheduler_states=False
        )
    if loaded is None:
        raise _damaged(checkpoint, "DeepSpeed found nothing to load in it")
    return state


def consolidated_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Gathers the trained weights from a run's own shards, without an engine.

    Returns:
        Tensors by the model's parameter names: the live weights for ZeRO 0 to 2; for ZeRO 3 the fp32 master weights,
        which the live ones are rounded from.

    Raises:
        RunError: If a shard is missing or damaged.
    """
    prepare_accelerator()  # unpickling imports DeepSpeed, which else announces the accelerator it found
    if read_state(checkpoint).zero_stage < 3:
        shard = checkpoint / "mp_rank_00_model_states.pt"
        # DeepSpeed's own shard of the user's own run: the one pickle that is trusted here.
        with _unreadable_shards(checkpoint):
            return torch.load(shard, map_location="cpu", weights_only=False)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    unheard = io.StringIO()
    with _unreadable_shards(checkpoint), redirect_stdout(unheard), redirect_stderr(unheard):
        weights = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name
        )
    assert weights is not None
    return weights
