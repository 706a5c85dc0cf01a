"""Writes a checkpoint's safetensors files and their index; a file at a time in memory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from sparsify.conversion.source_checkpoint import INDEX, SINGLE
from sparsify.conversion.source_tensors import DTYPES, INTEGERS, SourceTensor, check_finite, read_header
from sparsify.files import write_json
from sparsify.models.integer_linear import SCALES

SHARD_BYTES = 5 * 10**9
THRESHOLD = ".threshold"
"""Ends the name of a mask's tensor, which may be infinite."""


def write_shards(
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    read: Callable[[str], torch.Tensor],
    folder: Path,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes tensors to files of at most that size, and an index if there are several.

    Args:
        shapes: Of each tensor, by its name on disk.
        dtype: Of all tensors.
        read: Gives a tensor that shares no memory with another one.
        folder: Where to.
        shard_bytes: Maximum size of a file.
    """
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=shard_bytes)
    for file, names in split.filename_to_tensors.items():
        save_file({name: read(name) for name in names}, folder / file, metadata={"format": "pt"})
    write_index(folder, split.filename_to_tensors)


def copy_shards(shards: Iterable[Path], tensors: Mapping[str, SourceTensor], folder: Path) -> None:
    """Writes tensors to files named like those that they are in, under the given names; copies a file that stays as it is.

    A file is checked and written before the next one is read: one that fits into memory is read from the disk once.

    Raises:
        ModelError: If a weight is not finite; files may have been written by then.
    """
    written = []
    for shard in shards:
        mine = {name: tensor for name, tensor in tensors.items() if tensor.shard == shard}
        if not mine:
            continue
        written.append(shard.name)
        if all(tensor.stored == name for name, tensor in mine.items()) and mine.keys() == read_header(shard).keys():
            for name, tensor in mine.items():
                _check(name, tensor.stored, tensor.chunks())
            shutil.copyfile(shard, folder / shard.name)
        else:
            new = {name: tensor.read() for name, tensor in mine.items()}
            for name, tensor in mine.items():
                _check(name, tensor.stored, [new[name]])
            save_file(new, folder / shard.name, metadata={"format": "pt"})
    write_index(folder, written)


def in_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor as a checkpoint of that dtype stores it: integers stay, and so do their scales."""
    return tensor if name.endswith(SCALES) or not tensor.is_floating_point() else tensor.to(dtype)


def _check(name: str, stored: str, values: Iterable[torch.Tensor]) -> None:
    if not name.endswith(THRESHOLD):
        check_finite(stored, values)


def write_index(folder: Path, files: Iterable[str]) -> None:
    """Writes the index of a folder's files with weights, from what they hold; none where one file of the usual name is all."""
    names = list(files)
    if names == [SINGLE]:
        return
    headers = {name: read_header(folder / name) for name in names}
    dtypes = DTYPES | INTEGERS
    total_size = sum(
        torch.Size(tensor.shape).numel() * dtypes[tensor.dtype].itemsize
        for header in headers.values()
        for tensor in header.values()
    )
    weight_map = {tensor: name for name, header in headers.items() for tensor in header}
    write_json(folder / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
