"""Writes a model's weights shard by shard, with one shard in memory at a time; and SHA256SUMS for `sha256sum --check`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sparsify.conversion import weight_files
from sparsify.conversion.layout import LiveTensor, live_tensors, tensor_shapes
from sparsify.errors import RunError
from sparsify.models import SparseConfig
from sparsify.runs.state import StoredTensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def write_shards(
    weights: Mapping[str, StoredTensor],
    config: SparseConfig,
    folder: Path,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Writes safetensors in the layout of the family's stock checkpoints, and an index if there are several files.

    Peak memory is one shard, plus one layer's fused experts in a mixture.

    Raises:
        RunError: If a tensor is missing in `weights` or has another shape.
    """
    read = stock_reader(weights, config, dtype)
    weight_files.write_shards(tensor_shapes(config), dtype, read, folder, shard_bytes)


def stock_reader(
    weights: Mapping[str, StoredTensor], config: SparseConfig, dtype: torch.dtype
) -> Callable[[str], torch.Tensor]:
    """A function that reads a run's tensor by its name in stock checkpoints of its family; it keeps the last fused experts.

    Raises:
        RunError: When called, if a tensor is missing in `weights` or has another shape.
    """
    shapes, reader = tensor_shapes(config), _Reader(weights, config)
    return lambda name: reader.read(name, shapes[name], dtype)


class _Reader:
    """Reads tensors in the stored layout, and caches the last fused experts."""

    def __init__(self, weights: Mapping[str, StoredTensor], config: SparseConfig) -> None:
        self._weights, self._live = weights, live_tensors(config)
        self._last: tuple[str, torch.Tensor] | None = None

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        live = self._live[name]
        if live.name not in self._weights:
            raise RunError(
                f"The checkpoint does not hold {live.name}.",
                next_step="Use another checkpoint of the run.",
            )
        tensor = self._gathered(live)
        if live.expert is not None:
            tensor = tensor[live.expert]
            tensor = tensor if live.rows is None else tensor[live.rows]
        if tuple(tensor.shape) != shape:
            raise RunError(f"{name} has the shape {list(tensor.shape)} instead of {list(shape)}.")
        # Always a copy: safetensors refuses views, and a view would keep the whole fused tensor in memory.
        return tensor.to(dtype, copy=True).contiguous()

    def _gathered(self, live: LiveTensor) -> torch.Tensor:
        if self._last is not None and self._last[0] == live.name:
            return self._last[1]
        self._last = None
        tensor = self._weights[live.name].contiguous()
        if live.expert is not None:
            self._last = live.name, tensor
        return tensor


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
