"""Rewrites a checkpoint's shards so that they can be loaded with any number of processes, at any ZeRO stage.

What is written is DeepSpeed's universal format. Its own converter writes one for stages 1 and 2 and another for stage 3, and an
engine loads only that of its own stage; it also needs room for two copies, and reads whole shards into memory. Here one parameter
is in memory at a time, and stage 0 takes part.

    zero/NAME/fp32.pt, exp_avg.pt, exp_avg_sq.pt    the whole of a parameter: master weight and moments, in fp32
    zero/NAME/step.pt                               Adam's step, where stages 1 and 2 look for it
    zero/optimizer_state.pt                         Adam's step, where stage 3 looks for it
    mp_rank_00_model_states.pt                      DeepSpeed's counters, for stages 1 and 2
    zero_pp_rank_0_mp_rank_00_model_states.pt       the same, for stage 3

    python -m sparsify.training.universal CHECKPOINT TO
"""

from __future__ import annotations

import math
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sparsify.errors import StorageError
from sparsify.files import storage_errors
from sparsify.launch.child import run_child
from sparsify.methods.live_model import Engine
from sparsify.runs.shards import damaged_checkpoint, plain_shards
from sparsify.runs.state import prepare_accelerator, read_state
from sparsify.training.deepspeed_engine import parameter_groups

MODEL, FIRST_PART_OF_MODEL = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "dp_world_size", "mp_world_size", "ds_version")
FP32_BYTES = 4

VALUES = ("fp32", "exp_avg", "exp_avg_sq")

Values = Mapping[str, torch.Tensor]
"""Master weights and moments, flat, by the names of their files."""
Pieces = defaultdict[str, list[Values]]
"""What each rank has of each parameter, in the order of the ranks."""


def write_universal(checkpoint: Path, to: Path) -> None:
    """Rewrites a checkpoint into a new folder.

    Raises:
        RunError: If the checkpoint is damaged.
        StorageError: If there is no room for it.
    """
    with plain_shards(checkpoint):
        shards = Shards(checkpoint)
    with storage_errors(to):
        to.mkdir(parents=True)
        _check_room(to, len(VALUES) * FP32_BYTES * sum(map(math.prod, shards.shapes.values())))
        for name, shape in shards.shapes.items():
            for key in VALUES:
                whole = torch.cat([values[key] for values in shards.pieces[name]])
                if whole.numel() != math.prod(shape):
                    reason = f"{whole.numel()} of {math.prod(shape)} values of {name} are there"
                    raise damaged_checkpoint(checkpoint, reason)
                _write(to / "zero" / name / f"{key}.pt", {"param": whole.reshape(shape)})
            _write(to / "zero" / name / "step.pt", shards.step)
        # Without settings: those of the recipe hold, and stage 3 would give the first group's weight decay to all.
        common = {"state": {0: {"step": shards.step}}, "param_groups": [{} for _ in range(shards.num_groups)]}
        version = {"ds_version": shards.model["ds_version"]}
        _write(to / "zero" / "optimizer_state.pt", {"optimizer_state_dict": common, **common, **version})
        for name in (MODEL, FIRST_PART_OF_MODEL):
            _write(to / name, {key: shards.model[key] for key in COUNTERS})


def _check_room(to: Path, needed: int) -> None:
    free = shutil.disk_usage(to).free
    if free < needed:
        raise StorageError(
            f"{to} needs {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} GB are free.",
            allowed="Another number of processes or ZeRO stage needs room for what is trained, in fp32, and its two moments.",
            next_step="Nothing that was there before was changed. Free space, then run the same command again.",
        )


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)


class Shards:
    """What a checkpoint holds of each parameter, still on the disk.

    Attributes:
        model: What DeepSpeed writes besides the optimiser.
        shapes: Of each parameter, by its name.
        step: Adam's.
        num_groups: Groups of parameters.
    """

    def __init__(self, checkpoint: Path) -> None:
        processes, stage = read_state(checkpoint).shape
        self.model = _read(checkpoint / (FIRST_PART_OF_MODEL if stage == 3 else MODEL))
        self.pieces: Pieces = defaultdict(list)
        if stage == 0:
            adam = self.model["optimizer"]
            self.shapes = _add_whole(self.pieces, self.model, adam)
        else:
            groups: list[Mapping[str, torch.Size]] = self.model["param_shapes"]
            self.shapes = {name: shape for group in groups for name, shape in group.items()}
            shards = [_read(_shard_of(checkpoint, rank))["optimizer_state_dict"] for rank in range(processes)]
            adam = shards[0]["optimizer_state_dict" if stage == 3 else "base_optimizer_state"]
            for rank, shard in enumerate(shards):
                if stage == 3:
                    _add_partitions(self.pieces, shard, groups, rank, processes)
                else:
                    _add_cuts(self.pieces, shard)
        self.step = adam["state"][0]["step"]
        self.num_groups = len(adam["param_groups"])


def _shard_of(checkpoint: Path, rank: int) -> Path:
    path = checkpoint / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    return path if path.is_file() else path.with_name(f"bf16_{path.name}")


def _read(path: Path) -> Any:
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _add_whole(pieces: Pieces, model: dict[str, Any], adam: dict[str, Any]) -> dict[str, torch.Size]:
    """Stage 0: every rank has all of it, and the optimiser knows parameters by their number."""
    own: dict[int, str] = {}
    for name, value in model["module"].items():
        if name not in model["buffer_names"]:
            own.setdefault(value.data_ptr(), name)  # tied embeddings have a second name
    weights = {name: model["module"][name] for name in own.values()}
    shapes = {name: value.shape for name, value in weights.items()}
    for number, name in enumerate(chain(*parameter_groups(shapes).values())):
        vectors = {"fp32": weights[name], **adam["state"][number]}
        pieces[name].append({key: vectors[key].flatten() for key in VALUES})
    return shapes


def _add_cuts(pieces: Pieces, shard: dict[str, Any]) -> None:
    """Stages 1 and 2: a group of parameters is one vector, which is cut into equal parts."""
    masters, moments = shard["single_partition_of_fp32_groups"], shard["base_optimizer_state"]["state"]
    for group, places in enumerate(shard["param_slice_mappings"]):
        vectors = {"fp32": masters[group], **moments[group]}
        for name, place in places.items():
            pieces[name].append(_slice(vectors, place.start, place.numel))


def _add_partitions(
    pieces: Pieces, shard: dict[str, Any], groups: Sequence[Mapping[str, torch.Size]], rank: int, processes: int
) -> None:
    """Stage 3: every parameter is cut into equal parts, the last one padded."""
    masters, moments = shard["fp32_flat_groups"], shard["optimizer_state_dict"]["state"]
    for group, shapes in enumerate(groups):
        vectors = {"fp32": masters[group], **moments[group]}
        start = 0
        for name, shape in shapes.items():
            size = math.prod(shape)
            part = math.ceil(size / processes)
            pieces[name].append(_slice(vectors, start, min(part, max(0, size - rank * part))))
            start += part


def _slice(vectors: Values, start: int, numel: int) -> Values:
    return {key: vectors[key][start : start + numel] for key in VALUES}


@torch.no_grad()
def load_universal(engine: Engine, folder: Path) -> None:
    """Loads what `write_universal` wrote into an engine of stage 0; for the others DeepSpeed's own loading does.

    Raises:
        RunError: If it is damaged.
    """
    with plain_shards(folder):
        for name, parameter in engine.module.named_parameters():
            place = folder / "zero" / name
            weight, *moments = (_read(place / f"{key}.pt")["param"].to(parameter.device) for key in VALUES)
            parameter.copy_(weight)
            state = {key: value.clone() for key, value in zip(VALUES[1:], moments, strict=True)}
            engine.optimizer.state[parameter] = {"step": _read(place / "step.pt").clone(), **state}
        counters = _read(folder / MODEL)
    engine.global_steps, engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]
    engine.global_samples = counters["global_samples"]


def main(checkpoint: str, to: str) -> bool:
    prepare_accelerator()
    partial = Path(f"{to}.partial")
    try:
        write_universal(Path(checkpoint), partial / Path(checkpoint).name)
        with storage_errors(Path(to)):
            partial.rename(to)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(*sys.argv[1:])))
