"""Writes the checkpoint of a calibrated swap: the bare swap's shards with the tensors that calibration changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.folder import write_config
from sparsify.conversion.source import SourceCheckpoint, read_checkpoint, read_shapes
from sparsify.files import atomic_folder, write_json

INDEX = "model.safetensors.index.json"


def write_calibrated(
    folder: Path,
    tensors_of: Callable[[int], Path],
    to: Path,
    *,
    thresholds: bool,
    record: tuple[str, dict[str, Any]],
) -> None:
    """Writes a checkpoint folder, a shard at a time.

    Args:
        folder: The bare swap's checkpoint.
        tensors_of: File with the new tensors of a layer, by their names on disk.
        to: Folder to write.
        thresholds: Whether there are thresholds among them.
        record: Name and content of a JSON file to lay beside them.

    Raises:
        StorageError: If `to` cannot be written.
    """
    checkpoint = read_checkpoint(folder)
    name = checkpoint.config["ffn_activation"]
    config = sparse_config(checkpoint.config, name, str(folder))
    config.ffn_thresholds = "neuron" if thresholds else "none"
    homes = _homes(checkpoint, tensors_of, config.num_hidden_layers)
    with atomic_folder(to) as partial:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, partial / file.name)
        dtypes = [_rewrite(shard, homes[shard], partial) for shard in checkpoint.shards]
        if (folder / INDEX).is_file():
            _write_index(folder / INDEX, homes, partial / INDEX)
        write_config(config, partial, dtypes[0])
        write_json(partial / record[0], record[1])


def _homes(
    checkpoint: SourceCheckpoint, tensors_of: Callable[[int], Path], num_layers: int
) -> dict[Path, dict[str, Path]]:
    """For each shard, the names of its new tensors and the files that they are in. Thresholds live with the first
    tensor of their layer.
    """
    shard_of = {name: shard for shard in checkpoint.shards for name in read_shapes(shard)}
    homes: dict[Path, dict[str, Path]] = {shard: {} for shard in checkpoint.shards}
    for layer in range(num_layers):
        file = tensors_of(layer)
        names = sorted(read_shapes(file))
        default = next(shard_of[name] for name in names if name in shard_of)
        for name in names:
            homes[shard_of.get(name, default)][name] = file
    return homes


def _rewrite(shard: Path, changed: dict[str, Path], folder: Path) -> torch.dtype:
    tensors = load_file(shard)
    dtype = next(iter(tensors.values())).dtype
    for file in set(changed.values()):
        new = load_file(file)
        tensors |= {name: new[name] for name, home in changed.items() if home == file}
    save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    return dtype


def _write_index(old: Path, homes: dict[Path, dict[str, Path]], to: Path) -> None:
    index = json.loads(old.read_text(encoding="utf-8"))
    for shard, names in homes.items():
        index["weight_map"] |= dict.fromkeys(names, shard.name)
    write_json(to, index)
