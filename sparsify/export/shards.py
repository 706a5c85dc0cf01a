"""Writes a model's weights shard by shard, so that no more than one shard is ever in memory.

SHA256SUMS: a hash of every file of a folder, as `sha256sum --check` reads it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from sparsify.conversion.architecture import tensor_shapes
from sparsify.errors import RunError
from sparsify.files import write_json
from sparsify.models import SparseConfig
from sparsify.runs.state import StoredTensor

INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXPERT = re.compile(r"(.*)block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
_ROUTER = re.compile(r"(.*)block_sparse_moe\.gate\.weight")
_THRESHOLD = re.compile(r"(.*)block_sparse_moe\.(experts\.ffn_activation\.threshold)")


class _Place(NamedTuple):
    """Where a tensor of the stored layout is among the live ones."""

    live_name: str
    expert: int | None = None
    matrix: str = ""


def write_shards(
    weights: Mapping[str, StoredTensor],
    config: SparseConfig,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes safetensors in the layout of stock Mistral and Mixtral checkpoints, and an index if there are several.

    Memory holds one shard, and of a Mixtral one layer's fused experts besides.

    Args:
        weights: The live model's tensors by name, read when they are asked for.
        config: Of the model.
        folder: To write into.
        dtype: Of the written tensors.
        shard_bytes: Largest shard. A tensor that is larger has a shard of its own.

    Raises:
        RunError: If `weights` lacks a tensor, or holds one of another shape.
    """
    shapes = tensor_shapes(config)
    planned = {
        name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()
    }
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    reader = _Reader(weights, config)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: reader.read(name, shapes[name], dtype) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX_FILE, index)


class _Reader:
    """Reads tensors of the stored layout, and keeps the fused experts that it read last."""

    def __init__(self, weights: Mapping[str, StoredTensor], config: SparseConfig) -> None:
        self._weights, self._neurons = weights, config.intermediate_size
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        place = _place(name)
        if place.live_name not in self._weights:
            raise RunError(
                f"The checkpoint does not hold {place.live_name}.",
                next_step="Use another checkpoint of the run.",
            )
        tensor = self._gathered(place)
        if place.expert is not None:
            tensor = tensor[place.expert]
            if place.matrix == "1":
                tensor = tensor[: self._neurons]
            elif place.matrix == "3":
                tensor = tensor[self._neurons :]
        if tuple(tensor.shape) != shape:
            raise RunError(f"{name} has the shape {list(tensor.shape)} instead of {list(shape)}.")
        # A copy in any case: safetensors refuses views, and a view would keep the whole fused tensor.
        return tensor.to(dtype, copy=True).contiguous()

    def _gathered(self, place: _Place) -> torch.Tensor:
        if self._last is not None and self._last[0] == place.live_name:
            return self._last[1]
        self._last = None
        tensor = self._weights[place.live_name].contiguous()
        if place.expert is not None:
            self._last = place.live_name, tensor
        return tensor


def _place(name: str) -> _Place:
    if match := _EXPERT.fullmatch(name):
        fused = "down_proj" if match[3] == "2" else "gate_up_proj"
        return _Place(f"{match[1]}mlp.experts.{fused}", int(match[2]), match[3])
    if match := _ROUTER.fullmatch(name):
        return _Place(f"{match[1]}mlp.gate.weight")
    if match := _THRESHOLD.fullmatch(name):
        return _Place(f"{match[1]}mlp.{match[2]}")
    return _Place(name)


SUMS = "SHA256SUMS"
READ_BYTES = 1 << 20


def write_sums(folder: Path) -> list[Path]:
    """Writes SHA256SUMS over all files of a folder and returns them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))
    return files


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by file name, as SHA256SUMS has it; nothing if there is no such file."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    pairs = (line.split("  ", 1) for line in path.read_text().splitlines() if "  " in line)
    return {name: digest for digest, name in pairs}


def sha256(path: Path) -> str:
    """Hash of a file's content, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
