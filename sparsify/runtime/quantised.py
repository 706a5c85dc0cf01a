"""Weights in blocks of 32 elements of a row: int8 or int4 values and one scale a block.

A row stands in memory as the values of all its blocks, then their scales in bf16. bf16 has the range of fp32, so no weight is
too small or too large for its scale; that it is coarse costs nothing, as values are rounded against the scale as it is kept. A
weight is a value times its scale, exactly so in fp32. 8.5 and 4.5 bits a weight.

Keeps the int8 or int4 blocks of a module's weights, and makes them anew when the weights change.

A change is what torch itself counts (an optimiser's step, load_state_dict, any operator in place), or other memory (a cast, a
move, another parameter). What is written through `.data` is not counted, so it is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import pad

BlockFormat = Literal["int8", "int4"]
BLOCK = 32
_BITS: dict[BlockFormat, int] = {"int8": 8, "int4": 4}
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix in blocks.

    Args:
        data: uint8 [rows, bytes of a row]. Of int4, byte i of a block has its element i in the low four bits and element
            16 + i in the high ones, 8 added to both.
        format: Of the values.
        columns: Elements of a row; the last block is filled up with zeros.
    """

    data: torch.Tensor
    format: BlockFormat
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix that this stands for."""
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.data.nbytes

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.data.device

    def dequantised(
        self, rows: torch.Tensor | slice = slice(None), dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Some of the rows as they are computed with, [rows, columns]; exact in fp32 and float64."""
        data = self.data[rows]
        blocks = -(-self.columns // BLOCK)
        values = data[:, : blocks * BLOCK * _BITS[self.format] // 8]
        scales = data[:, values.shape[1] :].contiguous().view(torch.bfloat16).to(dtype)
        if self.format == "int8":
            values = values.contiguous().view(torch.int8)
        else:
            pairs = values.view(len(data), blocks, BLOCK // 2).to(torch.int8)
            values = torch.cat([pairs & 15, pairs >> 4 & 15], 2) - 8
        weights = values.view(len(data), blocks, BLOCK).to(dtype) * scales[..., None]
        return weights.view(len(data), blocks * BLOCK)[:, : self.columns]


def quantise(weight: torch.Tensor, format: BlockFormat) -> BlockMatrix:
    """Rounds a matrix [rows, columns] into blocks.

    int8: the largest weight of a block becomes 127 or -127. int4: it becomes -8 with a scale of its own sign, so that all sixteen
    values are used. A block with a weight that is not finite becomes one that is no number throughout, so that it shows.
    """
    rows, columns = weight.shape
    row_bytes = -(-columns // BLOCK) * (BLOCK * _BITS[format] // 8 + 2)
    data = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    whole = weight.detach().contiguous()  # at once: parts of a transposed matrix are slow to read
    for start in range(0, rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        data[chunk] = _quantise(whole[chunk], format)
    return BlockMatrix(data, format, columns)


def _quantise(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """[rows, bytes of a row] as uint8."""
    rows, columns = weight.shape
    blocks = pad(weight.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    low, high = blocks.aminmax(dim=2)  # no number if any of the block is none
    largest = torch.where(-low >= high, low, high)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    scales = (largest.abs() / 127 if format == "int8" else largest / -8).bfloat16()
    values = blocks / scales.float()[..., None]
    values = values.nan_to_num_(0.0).round_()  # a block of zeros, or one that is no number
    if format == "int8":
        stored = values.clamp_(-127, 127).to(torch.int8).view(torch.uint8)
    else:
        levels = values.clamp_(-8, 7).add_(8).to(torch.uint8)
        stored = levels[..., :16] | levels[..., 16:] << 4
    return torch.cat([stored.flatten(1), scales.contiguous().view(torch.uint8)], 1)


Matrices = Callable[[], Sequence[torch.Tensor]]


class KeptBlocks:
    """Blocks of one feed-forward block, or of each of its experts.

    Args:
        format: Of their values.
    """

    def __init__(self, format: BlockFormat) -> None:
        self.format: BlockFormat = format
        self._made: dict[int, tuple[object, list[BlockMatrix]]] = {}

    def of(
        self, index: int, parameters: Sequence[torch.Tensor], matrices: Matrices
    ) -> list[BlockMatrix]:
        """The blocks of expert `index`, 0 where there are no experts.

        Args:
            index: Of the expert.
            parameters: What the weights are views of.
            matrices: Gives the weights, each [rows, columns]; called when there are no blocks of these yet.
        """
        now = [_state(one) for one in parameters]
        if index not in self._made or self._made[index][0] != now:
            self._made.pop(index, None)  # not both at once
            self._made[index] = now, [quantise(one, self.format) for one in matrices()]
        return self._made[index][1]

    @property
    def num_bytes(self) -> int:
        """Memory that the blocks take."""
        return sum(one.nbytes for _, made in self._made.values() for one in made)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or another process, makes its own: it has other weights."""
        return {"format": self.format, "_made": {}}


def _state(parameter: torch.Tensor) -> tuple[object, ...]:
    """Differs after every change. The reference keeps no memory, but lets no other storage be taken for this one."""
    version = None if parameter.is_inference() else parameter._version
    storage = StorageWeakRef(parameter.untyped_storage())
    return storage, parameter.storage_offset(), parameter.dtype, version
