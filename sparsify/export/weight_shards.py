"""Writes a model's weights shard by shard, with one shard in memory at a time; and SHA256SUMS for `sha256sum --check`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from sparsify.conversion import weight_files
from sparsify.conversion.architecture import tensor_shapes
from sparsify.errors import RunError
from sparsify.models import SparseConfig
from sparsify.runs.state import StoredTensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_EXPERT = re.compile(r"(.*)block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
_ROUTER = re.compile(r"(.*)block_sparse_moe\.gate\.weight")
_MASK = re.compile(r"(.*)block_sparse_moe\.(experts\..*threshold)")


class _LiveTensor(NamedTuple):
    name: str
    expert: int | None = None
    matrix: str = ""


def write_shards(
    weights: Mapping[str, StoredTensor],
    config: SparseConfig,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes safetensors in the layout of stock Mistral and Mixtral checkpoints, and an index if there are several files.

    Peak memory is one shard, plus one layer's fused experts for Mixtral.

    Raises:
        RunError: If a tensor is missing in `weights` or has another shape.
    """
    read = stock_reader(weights, config, dtype)
    weight_files.write_shards(tensor_shapes(config), dtype, read, folder, shard_bytes)


def stock_reader(
    weights: Mapping[str, StoredTensor], config: SparseConfig, dtype: torch.dtype
) -> Callable[[str], torch.Tensor]:
    """A function that reads a run's tensor by its name in stock Mistral and Mixtral checkpoints; it keeps the last fused experts.

    Raises:
        RunError: When called, if a tensor is missing in `weights` or has another shape.
    """
    shapes, reader = tensor_shapes(config), _Reader(weights, config)
    return lambda name: reader.read(name, shapes[name], dtype)


class _Reader:
    """Reads tensors in the stored layout, and caches the last fused experts."""

    def __init__(self, weights: Mapping[str, StoredTensor], config: SparseConfig) -> None:
        self._weights, self._neurons = weights, config.intermediate_size
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        live = _live_tensor(name)
        if live.name not in self._weights:
            raise RunError(
                f"The checkpoint does not hold {live.name}.",
                next_step="Use another checkpoint of the run.",
            )
        tensor = self._gathered(live)
        if live.expert is not None:
            tensor = tensor[live.expert]
            # Fused experts hold gate (w1) above up (w3).
            if live.matrix == "1":
                tensor = tensor[: self._neurons]
            elif live.matrix == "3":
                tensor = tensor[self._neurons :]
        if tuple(tensor.shape) != shape:
            raise RunError(f"{name} has the shape {list(tensor.shape)} instead of {list(shape)}.")
        # Always a copy: safetensors refuses views, and a view would keep the whole fused tensor in memory.
        return tensor.to(dtype, copy=True).contiguous()

    def _gathered(self, live: _LiveTensor) -> torch.Tensor:
        if self._last is not None and self._last[0] == live.name:
            return self._last[1]
        self._last = None
        tensor = self._weights[live.name].contiguous()
        if live.expert is not None:
            self._last = live.name, tensor
        return tensor


def _live_tensor(stored_name: str) -> _LiveTensor:
    if match := _EXPERT.fullmatch(stored_name):
        fused = "down_proj" if match[3] == "2" else "gate_up_proj"
        return _LiveTensor(f"{match[1]}mlp.experts.{fused}", int(match[2]), match[3])
    if match := _ROUTER.fullmatch(stored_name):
        return _LiveTensor(f"{match[1]}mlp.gate.weight")
    if match := _MASK.fullmatch(stored_name):
        return _LiveTensor(f"{match[1]}mlp.{match[2]}")
    return _LiveTensor(stored_name)


SUMS = "SHA256SUMS"
READ_BYTES = 1 << 20


def write_sums(folder: Path) -> list[Path]:
    """Writes SHA256SUMS over all files of a folder and returns them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))
    return files


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by file name from SHA256SUMS; empty if there is no such file."""
    path = folder / SUMS
    if not path.is_file():
        return {}
    pairs = (line.split("  ", 1) for line in path.read_text(errors="replace").splitlines() if "  " in line)
    return {name: digest for digest, name in pairs}


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
