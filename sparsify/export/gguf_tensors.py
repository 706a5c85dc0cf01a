"""Writes a GGUF file's tensors one at a time, in the order of the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, quants
from numpy.typing import NDArray

from sparsify.errors import ExportError

LARGEST_F16 = 65504.0
WIDE_TYPES = (Type.F32, Type.BF16)
"""The other types hold their values, or the scales of their blocks, in F16."""

Get = Callable[[], torch.Tensor]


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        shape: As torch has it; ggml lists it in reverse.
        parts: Functions that give its values; several give its elements along the first axis, as experts have them.
    """

    name: str
    kind: Type
    shape: tuple[int, ...]
    parts: Sequence[Get]


def write_tensors(
    writer: GGUFWriter, entries: Sequence[Entry], on_tensor: Callable[[int, int], object] = lambda done, total: None
) -> None:
    """Writes the file of a writer that has its metadata, and closes it; in memory is one part in fp32, and one tensor as
    the file holds it.

    Args:
        writer: Its file is not yet opened.
        entries: All tensors.
        on_tensor: Gets how many of how many tensors are written, after each.

    Raises:
        ExportError: If a weight is not finite, or too large for its type.
    """
    for name, kind, shape, _ in entries:
        dtype = np.dtype({Type.F32: np.float32, Type.F16: np.float16}.get(kind, np.uint8))
        stored = quants.quant_shape_to_byte_shape(shape, kind) if dtype == np.uint8 else shape
        num_bytes = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, num_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, kind, _, parts) in enumerate(entries, 1):
        encoded = [encode(name, kind, get()) for get in parts]
        writer.write_tensor_data(encoded[0] if len(encoded) == 1 else np.stack(encoded))
        on_tensor(number, len(entries))
    writer.close()


def encode(name: str, kind: Type, tensor: torch.Tensor) -> NDArray[np.generic]:
    """A tensor's values as a file holds them in this type; bytes [..., bytes of a row] in all but F32 and F16.

    Raises:
        ExportError: If one is not finite, or too large for the type.
    """
    values = tensor.detach().float().cpu().contiguous().numpy()
    largest = np.abs(values).max(initial=0.0)
    if not np.isfinite(largest):
        raise ExportError(f"{name} has values that are not finite.")
    if kind not in WIDE_TYPES and largest > LARGEST_F16:
        raise ExportError(f"{name} has values outside the range of F16: up to {largest:g}.")
    return quants.quantize(values, kind)


def interleaved(get: Get, heads: int) -> Get:
    """Reorders rows to ggml's rotary pairs (0, 1), (2, 3), … from (0, half), (1, half + 1), …"""

    def permuted() -> torch.Tensor:
        rows = get()
        return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)

    return permuted
