"""Weights in blocks of 32 elements of a row: int8 or int4 values and one scale a block, 8.5 and 4.5 bits a weight.

In memory a row is the values of all its blocks, then their scales in bf16. bf16 has the range of fp32, so no weight is too small
or too large for its scale. Its coarseness costs nothing, since values are rounded against the stored scale. A weight is a value
times its scale, exact in fp32.

A projection that is held by columns, [inputs, outputs], has 32 outputs in a block. Weights of different outputs have different sizes,
and the largest of a block decides how coarse the others become. So the weights of each output are divided by their root mean square
first; sums are multiplied by it once.

`KeptBlocks` makes new blocks when a module's weights change. It notices changes that torch counts (an optimiser's step,
load_state_dict, any in-place operator) and other memory (a cast, a move, another parameter), but not writes through `.data`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import linear, pad

BlockFormat = Literal["int8", "int4"]
BLOCK = 32
_BITS: dict[BlockFormat, int] = {"int8": 8, "int4": 4}
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix in blocks.

    Args:
        data: uint8 [rows, bytes of a row]. In int4, byte i of a block has its element i in the low four bits and element
            16 + i in the high ones, 8 added to both.
        columns: Elements of a row; the last block is padded with zeros.
        factors: What each column is multiplied by after that, fp32 [columns, padded to whole blocks]; None for 1.
    """

    data: torch.Tensor
    format: BlockFormat
    columns: int
    factors: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.factor_bytes

    @property
    def factor_bytes(self) -> int:
        """Bytes that are read in any case, whichever rows are."""
        return 0 if self.factors is None else self.factors.nbytes

    @property
    def device(self) -> torch.device:
        return self.data.device

    def dequantised(self, rows: torch.Tensor | slice = slice(None), dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dequantises some of the rows, [rows, columns]; without factors exact in fp32 and fp64."""
        data = self.data[rows]
        blocks = -(-self.columns // BLOCK)
        values = data[:, : blocks * BLOCK * _BITS[self.format] // 8]
        scales = data[:, values.shape[1] :].contiguous().view(torch.bfloat16).to(dtype)
        if self.format == "int8":
            values = values.contiguous().view(torch.int8)
        else:
            pairs = values.view(len(data), blocks, BLOCK // 2).to(torch.int8)
            values = torch.cat([pairs & 15, pairs >> 4 & 15], 2) - 8
        weights = (values.view(len(data), blocks, BLOCK).to(dtype) * scales[..., None]).view(len(data), blocks * BLOCK)
        if self.factors is not None:
            weights = weights * self.factors.to(dtype)
        return weights[:, : self.columns]


def bits_per_weight(format: BlockFormat) -> float:
    """Scales included; of rows whose last block is full."""
    return _BITS[format] + 16 / BLOCK


def quantise(weight: torch.Tensor, format: BlockFormat, *, by_columns: bool = False) -> BlockMatrix:
    """Rounds a matrix [rows, columns] into blocks.

    int8: the largest weight of a block becomes 127 or -127. int4: it becomes -8, and the scale has a sign. Scales that round it, too,
    for the least squared error of a block cost more: SmolLM2-135M lost 0.41 nats with them instead of 0.30. A block with a weight that
    is not finite becomes NaN, so that the error is visible.

    Args:
        weight: A projection [outputs, inputs], or its transpose.
        format: Of the blocks.
        by_columns: Whether it is the transpose, whose columns get factors.
    """
    rows, columns = weight.shape
    factors = column_factors(weight) if by_columns else None
    row_bytes = -(-columns // BLOCK) * (BLOCK * _BITS[format] // 8 + 2)
    data = torch.empty(rows, row_bytes, dtype=torch.uint8, device=weight.device)
    whole = weight.detach().contiguous()  # once: slices of a transposed matrix are slow to read
    for start in range(0, rows, _CHUNK_ROWS):
        chunk = slice(start, start + _CHUNK_ROWS)
        part = whole[chunk] if factors is None else whole[chunk].float() / factors
        data[chunk] = _quantise(part, format)
    return BlockMatrix(data, format, columns, None if factors is None else padded_factors(factors))


def column_factors(weight: torch.Tensor) -> torch.Tensor:
    """What the weights of each column of [rows, columns] are divided by: their root mean square, fp32; 1 where it is 0 or not finite."""
    largest, squares = torch.zeros(2, weight.shape[1], device=weight.device)
    chunks = weight.detach().split(_CHUNK_ROWS)
    for chunk in chunks:
        largest = torch.maximum(largest, chunk.float().abs().amax(0)) if len(chunk) else largest
    for chunk in chunks:  # squares of small weights would be 0, and of large ones infinite
        squares = squares + (chunk.float() / largest).square().sum(0)
    values = (squares / max(len(weight), 1)).sqrt() * largest
    return torch.where(values.isfinite() & (values > 0), values, 1.0)


def padded_factors(factors: torch.Tensor) -> torch.Tensor:
    """As a BlockMatrix holds them."""
    return pad(factors, (0, -factors.shape[-1] % BLOCK), value=1.0)


def _quantise(weight: torch.Tensor, format: BlockFormat) -> torch.Tensor:
    """[rows, bytes of a row] as uint8."""
    rows, columns = weight.shape
    blocks = pad(weight.float(), (0, -columns % BLOCK)).view(rows, -1, BLOCK)
    low, high = blocks.aminmax(dim=2)  # NaN if any element of the block is
    largest = torch.where(-low >= high, low, high)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    if format == "int8":
        scales = (largest.abs() / 127).bfloat16()
        stored = _rounded(blocks, scales, -127, 127).to(torch.int8).view(torch.uint8)
    else:
        scales = (largest / -8).bfloat16()
        levels = _rounded(blocks, scales, -8, 7).add_(8).to(torch.uint8)
        stored = levels[..., :16] | levels[..., 16:] << 4
    return torch.cat([stored.flatten(1), scales.contiguous().view(torch.uint8)], 1)


def _rounded(blocks: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    values = blocks / scales.float()[..., None]
    return values.nan_to_num_(0.0).round_().clamp_(low, high)  # 0 / 0 and NaN blocks


def rounded_states(x: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., columns] as products with blocks read them: multiples of a 127th of the largest in their block.

    A block of BLOCK elements with one that is not finite becomes NaN. Mirrors native/levels.h, bit by bit in fp32.
    """
    columns = x.shape[-1]
    blocks = pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1, keepdim=True)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    inverse = torch.where(largest > 0, 127.0 / largest, 0.0)
    rounded = (blocks * inverse).clamp(-127, 127).round() * (largest / 127.0)
    return torch.where(largest.isnan(), torch.nan, rounded).flatten(-2)[..., :columns]


def product(x: torch.Tensor, matrix: BlockMatrix, *, by_columns: bool) -> torch.Tensor:
    """[..., outputs] of x [..., inputs] and a matrix [outputs, inputs], or [inputs, outputs] if it is held by columns.

    As decoding computes it: sums of columns do not round x.
    """
    rows = x.reshape(-1, x.shape[-1])  # torch copies weights for a slice of a batch
    if by_columns:
        outputs = rows @ matrix.dequantised(dtype=x.dtype)
    else:
        outputs = linear(rounded_states(rows).to(x.dtype), matrix.dequantised(dtype=x.dtype))
    return outputs.unflatten(0, x.shape[:-1])


Matrices = Callable[[], Sequence[torch.Tensor]]


class KeptBlocks:
    """Weight blocks of one feed-forward block, or of each of its experts."""

    def __init__(self, format: BlockFormat) -> None:
        self.format: BlockFormat = format
        self._cached: dict[int, tuple[object, list[BlockMatrix]]] = {}
        self._frozen = False

    def freeze(self) -> None:
        """Keeps the blocks whatever happens to the weights, which may be freed."""
        self._frozen = True

    def of(
        self,
        index: int,
        parameters: Sequence[torch.Tensor],
        matrices: Matrices,
        by_columns: Collection[int] = (),
    ) -> list[BlockMatrix]:
        """The blocks of expert `index` (0 where there are none), made from `matrices` unless those of its parameters
        are current. `by_columns` are the places of those among them that are held by columns.
        """
        if self._frozen:
            return self._cached[index][1]
        now = [_state(one) for one in parameters]
        if index not in self._cached or self._cached[index][0] != now:
            self._cached.pop(index, None)  # frees the old blocks before new ones are made
            self._cached[index] = now, self._make(matrices(), by_columns)
        return self._cached[index][1]

    def _make(self, matrices: Sequence[torch.Tensor], by_columns: Collection[int]) -> list[BlockMatrix]:
        return [quantise(one, self.format, by_columns=place in by_columns) for place, one in enumerate(matrices)]

    @property
    def num_bytes(self) -> int:
        return sum(one.nbytes for _, matrices in self._cached.values() for one in matrices)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and other processes make their own blocks, since they have their own weights; unless these are freed."""
        kept = {index: (None, blocks) for index, (_, blocks) in self._cached.items()} if self._frozen else {}
        return vars(self) | {"_cached": kept}


def _state(parameter: torch.Tensor) -> tuple[object, ...]:
    """A value that differs after every change. The weak reference keeps no memory alive, but tells a new storage at the same
    address from the old one.
    """
    version = None if parameter.is_inference() else parameter._version
    storage = StorageWeakRef(parameter.untyped_storage())
    return storage, parameter.storage_offset(), parameter.dtype, version
