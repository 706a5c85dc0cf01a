"""What a checkpoint of a run holds: its counters, and its weights read without an engine."""

from __future__ import annotations

import io
import os
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import ConfigDict

from sparsify.conversion.manifest import damage
from sparsify.errors import RunError
from sparsify.metadata import read_record
from sparsify.runs.shards import LATEST as LATEST
from sparsify.runs.shards import damaged_checkpoint, plain_shards

STATE = "state.json"
REFERENCE = "reference.safetensors"
_NAME = re.compile(r"step-\d{8,}")


class Shape(NamedTuple):
    """What decides how DeepSpeed cuts a run's state into files."""

    processes: int
    zero_stage: int

    def __str__(self) -> str:
        return f"{self.processes} process(es) at ZeRO stage {self.zero_stage}"


@dataclass(frozen=True)
class TrainingState:
    """Everything that passes from one step to the next besides the engine's own tensors."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: int
    seen_tokens: int
    processes: int
    zero_stage: int
    drawn_sequences: dict[str, int]
    """Sequences of each source so far: what was delivered, and where the schedule resumes without counting again."""
    recent_losses: list[dict[str, float] | None] = field(default_factory=list)
    """Loss of each source at the newest steps, None where a step was bad: what the next step is compared with."""
    recent_rises: list[float | None] = field(default_factory=list)
    """How far the loss of each of these steps was above what was expected of it, in nats; None where it was not finite."""
    held_out_loss: float | None = None
    """Of the newest validation, in nats."""
    skipped_sequences: list[list[int]] = field(default_factory=list)
    """First and last sequence of each range that did not go into the weights, because its steps were bad or rolled back."""
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)
    """State of each method that takes part in training, by its name (`sparsify.methods.objective`); empty ones are omitted."""

    @property
    def shape(self) -> Shape:
        return Shape(self.processes, self.zero_stage)


def crosses(every_tokens: int, seen_tokens: int, step_tokens: int) -> bool:
    """Whether the step that ended at `seen_tokens` crossed a multiple of `every_tokens`."""
    return seen_tokens // every_tokens > (seen_tokens - step_tokens) // every_tokens


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after this many steps."""
    return f"step-{step:08d}"


def checkpoint_names(checkpoints: Path) -> list[str]:
    """Names of the checkpoint folders, the newest first, whole or not."""
    return sorted((path.name for path in checkpoints.glob("step-*") if _NAME.fullmatch(path.name)), reverse=True)


def named_checkpoint(checkpoints: Path) -> str | None:
    """What `latest` names; None if it is missing or not a file, or names none."""
    pointer = checkpoints / LATEST
    name = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    return name if _NAME.fullmatch(name) else None


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint that `latest` names, or None when there is none yet. Only its being there is looked at. Where
    `latest` names none, it is the newest.

    Raises:
        RunError: If `latest` names a checkpoint that is not there.
    """
    named = named_checkpoint(checkpoints)
    if named is None:
        whole = (name for name in checkpoint_names(checkpoints) if (checkpoints / name / STATE).is_file())
        named = next(whole, None)
        if named is None:
            return None
    pointer, path = checkpoints / LATEST, checkpoints / named
    if not (path / STATE).is_file():
        raise RunError(
            f"{pointer} names {path.name}, which is not there or not whole.",
            next_step=f"Write the name of another folder in {checkpoints} into {pointer.name}.",
        )
    return path


def read_state(checkpoint: Path) -> TrainingState:
    """Raises RunError if a checkpoint's counters are missing or damaged."""
    try:
        return read_record(checkpoint / STATE, TrainingState, "the counters of a checkpoint", RunError)
    except RunError as error:
        raise damaged_checkpoint(checkpoint, error.given.removeprefix(f"{checkpoint}/").rstrip(".")) from error


class StoredTensor(Protocol):
    """A tensor that is still on the disk."""

    @property
    def shape(self) -> torch.Size: ...

    def contiguous(self) -> torch.Tensor: ...


def consolidated_weights(checkpoint: Path) -> dict[str, StoredTensor]:
    """Finds the trained weights in a run's own shards, without an engine. A tensor is read when it is needed.

    Returns:
        Tensors by the model's parameter names: the live weights for ZeRO 0 to 2; for ZeRO 3 the fp32 master weights,
        which the live ones are rounded from.

    Raises:
        RunError: If a shard is missing or damaged.
    """
    prepare_accelerator()  # unpickling imports DeepSpeed, which otherwise announces the accelerator it found
    whole_model = read_state(checkpoint).zero_stage < 3
    shard = checkpoint / "mp_rank_00_model_states.pt"
    reason = damage(checkpoint, {shard.name} if whole_model else None)
    if reason is not None:
        raise damaged_checkpoint(checkpoint, reason)
    if whole_model:
        with plain_shards(checkpoint):
            return torch.load(shard, map_location="cpu", mmap=True, weights_only=True)["module"]
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    unheard = io.StringIO()
    with plain_shards(checkpoint), redirect_stdout(unheard), redirect_stderr(unheard):
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), tag=checkpoint.name, lazy_mode=True)
    assert weights is not None
    return weights


def prepare_accelerator() -> str:
    """Chooses the accelerator before DeepSpeed looks for one, and returns the device type.

    On a CPU, `init_distributed` would compile DeepSpeed's shared-memory collectives at every first use: over a
    minute, and an error where there is no C++ compiler. gloo serves as well, so that operator is marked absent.
    """
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert get_accelerator().device_name() == device  # pyright: ignore[reportOptionalMemberAccess]
    if device == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return device
