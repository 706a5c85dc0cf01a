"""Sparse weights as the kernels read them: one bit for each weight that says whether it is stored, and the stored ones one after another.

The stored ones are bf16, or the values of int8 or int4 blocks (`models/quantised.py`), whose scales stay. A matrix with a share s of its
weights zero takes 1/8 + (1 - s) · b bytes for each weight of b bytes, scales of blocks in addition, and of each row 4 bytes for each
512 columns and 8 for its place.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from sparsify.errors import ModelError
from sparsify.models.quantised import BLOCK, BlockFormat, BlockMatrix, KeptBlocks, column_factors, quantise

PackedFormat = Literal["packed_bf16", "packed_int8", "packed_int4"]
CHUNK, GROUP = 512, 64
"""Columns whose values begin at a stored place, and columns of one word of bits; equal those in native/packed.h."""
BEYOND = 64
"""Bytes behind the last row, which the kernels may read."""
ROWS_AT_ONCE = 256
"""Rows that are packed together."""


@dataclass(frozen=True)
class PackedMatrix:
    """A packed matrix.

    Args:
        data: uint8 [bytes], as native/packed.h describes it.
        format: What the stored values are.
        shape: Rows and columns.
        factors: What each column is multiplied by after that, fp32 [columns, padded to whole groups]; None for 1.
    """

    data: torch.Tensor
    format: PackedFormat
    shape: tuple[int, int]
    factors: torch.Tensor | None = None

    @property
    def columns(self) -> int:
        return self.shape[1]

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def nbytes(self) -> int:
        return self.data.nbytes - BEYOND + self.factor_bytes

    @property
    def factor_bytes(self) -> int:
        """Bytes that are read in any case, whichever rows are."""
        return 0 if self.factors is None else self.factors.nbytes

    @property
    def row_bytes(self) -> int:
        """Of a row, in the mean; rounded up."""
        return -(-(self.nbytes - self.factor_bytes) // self.shape[0])

    def dequantised(self, rows: torch.Tensor | slice = slice(None), dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Unpacks some of the rows, [rows, columns]; exact in fp32 and fp64, and packed bf16 also in bf16."""
        data = self.data.numpy()
        chosen = rows.numpy() if isinstance(rows, torch.Tensor) else rows
        starts = data[: 8 * self.shape[0]].view(np.int64)[chosen]
        width = -(-self.columns // GROUP) * GROUP
        parts = [self._chunk(data, starts, first, min(CHUNK, width - first)) for first in range(0, width, CHUNK)]
        weights = torch.cat(parts, dim=1)
        if self.factors is not None:
            weights = weights * self.factors
        return weights[:, : self.columns].to(dtype)

    def _chunk(self, data: NDArray[np.uint8], starts: NDArray[np.int64], first: int, columns: int) -> torch.Tensor:
        """A chunk of rows that begin at these places, fp32 [rows, columns]."""
        places = data[_span(starts + 4 * (first // CHUNK), 4)].view(np.uint32)[:, 0].astype(np.int64)
        at = starts + places
        is_stored = np.unpackbits(data[_span(at, columns // 8)], axis=1, bitorder="little").astype(bool)
        at, scales = at + columns // 8, None
        if self.format != "packed_bf16":
            bits = np.ascontiguousarray(data[_span(at, columns // BLOCK * 2)]).view(np.int16)
            scales = torch.from_numpy(bits).view(torch.bfloat16).float()
            at = at + columns // BLOCK * 2
        counts = is_stored.reshape(len(at), columns // GROUP, GROUP).sum(2)
        behind = at[:, None] + _value_bytes(counts, self.format).cumsum(1)
        begin = behind - _value_bytes(counts, self.format)
        row, column = is_stored.nonzero()
        number = _number_in_group(is_stored)[row, column]
        values = torch.zeros(is_stored.shape)
        found = _take_values(data, begin[row, column // GROUP], number, self.format)
        values[torch.from_numpy(row), torch.from_numpy(column)] = torch.from_numpy(found)
        return values if scales is None else values * scales.repeat_interleave(BLOCK, dim=1)


def pack(weight: torch.Tensor, format: PackedFormat, *, by_columns: bool = False) -> PackedMatrix:
    """Packs a matrix [rows, columns] on a CPU; values of bf16 are rounded to it, those of blocks as `quantise` rounds them.

    Args:
        weight: A projection [outputs, inputs], or its transpose.
        format: Of the stored values.
        by_columns: Whether it is the transpose, whose columns get factors in front of blocks.
    """
    rows, columns = weight.shape
    factors = column_factors(weight) if by_columns and format != "packed_bf16" else None
    places = np.zeros(rows, np.int64)
    parts: list[NDArray[np.uint8]] = []
    end = places.nbytes
    for start in range(0, rows, ROWS_AT_ONCE):
        part = weight.detach()[start : start + ROWS_AT_ONCE]
        part = part if factors is None else part.float() / factors
        packed, lengths = _pack_rows(part, format)
        places[start : start + len(part)] = end + np.concatenate([[0], lengths.cumsum()[:-1]])
        end += len(packed)
        parts.append(packed)
    data = np.concatenate([places.view(np.uint8), *parts, np.zeros(BEYOND, np.uint8)])
    padded = None if factors is None else pad(factors, (0, -columns % GROUP), value=1.0)
    return PackedMatrix(torch.from_numpy(data), format, (rows, columns), padded)


def _pack_rows(weight: torch.Tensor, format: PackedFormat) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of some rows, and how many each has."""
    rows, columns = weight.shape
    width = -(-columns // GROUP) * GROUP
    chunks = range(0, width, CHUNK)
    values, scales = _values(pad(weight, (0, width - columns)), format)
    is_stored = values != 0
    counts = is_stored.reshape(rows, -1, GROUP).sum(2)  # of each group
    value_bytes = _value_bytes(counts, format)
    scale_bytes = 0 if scales is None else GROUP // BLOCK * 2
    group_bytes = value_bytes + GROUP // 8 + scale_bytes
    lengths = 4 * len(chunks) + group_bytes.sum(1)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    data = np.zeros(int(lengths.sum()), np.uint8)
    at = starts + 4 * len(chunks)
    bits = np.packbits(is_stored, axis=1, bitorder="little")
    for chunk, first in enumerate(chunks):
        last = min(width, first + CHUNK)
        groups = slice(first // GROUP, last // GROUP)
        data[_span(starts + 4 * chunk, 4)] = (at - starts).astype(np.uint32)[:, None].view(np.uint8)
        data[_span(at, (last - first) // 8)] = bits[:, first // 8 : last // 8]
        at = at + (last - first) // 8
        if scales is not None:
            own = np.ascontiguousarray(scales[:, first // BLOCK : last // BLOCK]).view(np.uint8)
            data[_span(at, own.shape[1])] = own
            at = at + own.shape[1]
        behind = at[:, None] + value_bytes[:, groups].cumsum(1)
        _put_values(data, values[:, first:last], behind - value_bytes[:, groups], format)
        at = behind[:, -1]
    return data, lengths.astype(np.int64)


def _values(weight: torch.Tensor, format: PackedFormat) -> tuple[NDArray[np.int16], NDArray[np.int16] | None]:
    """Bits of each weight as they are stored, 0 where it is not, and scales of blocks as bits of bf16."""
    if format == "packed_bf16":
        bits = weight.to(torch.bfloat16).view(torch.int16).numpy()
        return np.where(bits == np.int16(-32768), 0, bits).astype(np.int16), None  # -0 is a zero, too
    blocks = quantise(weight.float(), "int8" if format == "packed_int8" else "int4")
    columns = blocks.columns
    scales = blocks.data[:, -(columns // BLOCK * 2) :].contiguous().view(torch.int16).numpy()
    values = blocks.data[:, : -(columns // BLOCK * 2)]
    if format == "packed_int8":
        return values.contiguous().view(torch.int8).to(torch.int16).numpy(), scales
    pairs = values.view(len(values), -1, BLOCK // 2)
    return torch.cat([pairs & 15, pairs >> 4], 2).flatten(1).to(torch.int16).sub(8).numpy(), scales


def _put_values(
    data: NDArray[np.uint8], values: NDArray[np.int16], starts: NDArray[np.int64], format: PackedFormat
) -> None:
    """Writes the values of a chunk [rows, columns] behind the places where their groups begin, [rows, groups]."""
    rows, columns = values.nonzero()
    number = _number_in_group(values != 0)[rows, columns]
    stored, begin = values[rows, columns], starts[rows, columns // GROUP]
    if format == "packed_bf16":
        low = stored.view(np.uint16)
        data[begin + 2 * number], data[begin + 2 * number + 1] = low & 255, low >> 8
    elif format == "packed_int8":
        data[begin + number] = stored.astype(np.int8).view(np.uint8)
    else:
        levels = (stored + 8).astype(np.uint8) << (number % 2 * 4).astype(np.uint8)
        np.bitwise_or.at(data, begin + number // 2, levels)


def _take_values(
    data: NDArray[np.uint8], begin: NDArray[np.int64], number: NDArray[np.int64], format: PackedFormat
) -> NDArray[np.float32]:
    """Values by the place where their group begins, and their number in it."""
    if format == "packed_bf16":
        bits = data[begin + 2 * number].astype(np.uint32) << 16 | data[begin + 2 * number + 1].astype(np.uint32) << 24
        return bits.view(np.float32)
    if format == "packed_int8":
        return data[begin + number].view(np.int8).astype(np.float32)
    levels = data[begin + number // 2] >> (number % 2 * 4).astype(np.uint8) & 15
    return levels.astype(np.float32) - 8


def _value_bytes(counts: NDArray[np.int64], format: PackedFormat) -> NDArray[np.int64]:
    """Bytes of so many values of a group."""
    return {"packed_bf16": 2 * counts, "packed_int8": counts, "packed_int4": (counts + 1) // 2}[format]


def _number_in_group(is_stored: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of each stored value [rows, columns], how many of its group are in front of it."""
    groups = is_stored.reshape(len(is_stored), is_stored.shape[1] // GROUP, GROUP)
    return (groups.cumsum(2) - 1).reshape(is_stored.shape)


def _span(starts: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    return starts[:, None] + np.arange(count)


PACKED: dict[BlockFormat | None, PackedFormat] = {None: "packed_bf16", "int8": "packed_int8", "int4": "packed_int4"}
"""What sparse weights are packed as, by the format in which they are to be read."""


class KeptPacked(KeptBlocks):
    """Packed weights in place of blocks; they follow changes of the weights as those do."""

    def __init__(self, format: PackedFormat) -> None:
        super().__init__(format)  # pyright: ignore[reportArgumentType]

    def _make(self, matrices: Sequence[torch.Tensor], by_columns: Collection[int]) -> list[BlockMatrix]:
        others = {str(one.dtype) for one in matrices if one.dtype != torch.bfloat16}
        if self.format == "packed_bf16" and others:
            raise ModelError(
                f"The model is {others.pop()} now, and its sparse weights were packed as bf16.",
                next_step="Cast it back to bf16, or accelerate it again with packed=False.",
            )
        return [
            pack(one, self.format, by_columns=place in by_columns)  # pyright: ignore[reportArgumentType, reportReturnType]
            for place, one in enumerate(matrices)
        ]
