"""The columns and rows of a file that are in memory, where masks choose inputs (DIP, arXiv 2412.01380).

A token needs the columns of gate and up of the inputs that the mask of the block's input keeps, and then the rows of down of the neurons
that are not zero. Each has a cache of its own. With γ below 1 the masks prefer what is in memory (`cache_aware.py`): the sizes of what
is not are multiplied by γ before the largest are chosen.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.runtime.block_store import COLUMNS, DOWN_ROWS, CStore
from sparsify.runtime.cache_aware import gamma_at
from sparsify.runtime.file_reads import NeuronReads
from sparsify.runtime.memory_plan import chunk_bytes, ring_bytes, smallest_memory
from sparsify.runtime.native_ffn import TOP_K, FfnCall
from sparsify.runtime.neuron_cache import Bytes, NeuronCache, Units
from sparsify.runtime.neuron_file import HEADER_BYTES, NeuronFile, NeuronLayout
from sparsify.runtime.weights import Matrix


@dataclass(frozen=True)
class PartLayout(NeuronLayout):
    """Where the units of one kind are: `neurons` of them in a block.

    Attributes:
        stride: Bytes from one block to the next.
        start: Of the first unit in a block.
    """

    stride: int
    start: int

    @property
    def block_bytes(self) -> int:
        return self.stride

    @property
    def whole_bytes(self) -> int:
        return self.neurons * self.unit_bytes

    def rows_offset(self, block: int) -> int:
        return HEADER_BYTES + block * self.stride + self.start


def part_layouts(layout: NeuronLayout) -> tuple[PartLayout, PartLayout]:
    """The units of inputs and those of neurons of a file of columns."""
    same: dict[str, Any] = {one.name: getattr(layout, one.name) for one in fields(NeuronLayout)} | {"layout": "whole"}
    columns: dict[str, Any] = {
        "neurons": layout.hidden,
        "row_bytes": 2 * layout.neurons * layout.row_bytes // layout.hidden,
    }
    rows: dict[str, Any] = {"unit_bytes": layout.down_bytes}
    stride = layout.block_bytes
    return (
        PartLayout(**same | columns, stride=stride, start=0),
        PartLayout(**same | rows, stride=stride, start=layout.inputs_bytes),
    )


def column_ring_bytes(layout: NeuronLayout) -> int:
    return sum(map(ring_bytes, part_layouts(layout)))


@dataclass(frozen=True)
class _PartFile:
    path: Path
    descriptor: int
    layout: PartLayout
    factors: torch.Tensor

    def close(self) -> None:
        """The file is closed by whoever opened it."""


class PartCache(NeuronCache):
    """The units of one kind.

    Args:
        file: Where they are.
        num_bytes: Memory for them.
        holding: What they are: `COLUMNS` or `DOWN_ROWS`.
        policy: As of NeuronCache.
        gamma: Factor of the sizes of what is not in memory.
    """

    def __init__(self, file: _PartFile, num_bytes: int, holding: int, policy: str, gamma: float) -> None:
        self._part, self.gamma = holding, gamma
        layout = file.layout
        self.preferences = [np.ones(layout.neurons, np.float32) for _ in range(layout.blocks)]
        self._seen = [0] * layout.blocks
        super().__init__(file, num_bytes, policy=policy)  # pyright: ignore[reportArgumentType]

    @property
    def _holding(self) -> int:
        return self._part

    def forget(self) -> None:
        super().forget()
        for layer, one in enumerate(self.preferences):
            one[:], self._seen[layer] = 1.0, 0

    def _make_room(self, layer: int, mask: NDArray[np.bool_], lacking: int) -> None:
        super()._make_room(layer, mask, lacking)
        for one in self.preferences:  # of what others had nothing is left
            one[:] = 1.0

    def _make_resident(self, layer: int, needed: Units) -> None:
        super()._make_resident(layer, needed)
        self._seen[layer] += 1
        if self.gamma < 1:
            factor = gamma_at(self.gamma, self._seen[layer])
            self.preferences[layer][:] = np.where(self._policies[layer].resident, 1.0, factor)

    def slots_matrix(self, start: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[units, columns]: from this byte of each unit on, as the slots hold them."""
        return self._strided(start, columns, self.layout.unit_bytes, dtype)

    def whole_matrix(self, start: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """The same where `read_whole` puts them."""
        return self._strided(start, columns, self.layout.row_bytes, dtype)

    def _strided(self, start: int, columns: int, stride: int, dtype: torch.dtype) -> torch.Tensor:
        values = self.memory[: len(self.memory) // dtype.itemsize * dtype.itemsize].view(dtype)
        size = dtype.itemsize
        return values.as_strided((self.layout.neurons, columns), (stride // size, 1), start // size)

    def read_whole(self, block: int) -> None:
        """Reads all units of a block, contiguous and without padding; what was in memory is gone."""
        if self._whole == block:
            return
        layout = self.layout
        self.forget()
        self._spare = self._least_spare()
        rows = np.frombuffer(self._memory, np.uint8)[: layout.neurons * layout.row_bytes]
        rows = rows.reshape(layout.neurons, layout.row_bytes)

        def put(part: Bytes, at: int) -> None:
            units, first = part.reshape(-1, layout.unit_bytes), at // layout.unit_bytes
            rows[first : first + len(units)] = units[:, : layout.row_bytes]

        piece = chunk_bytes(layout) // layout.unit_bytes * layout.unit_bytes
        self._read_run(layout.units_offset(block), layout.neurons * layout.unit_bytes, put, piece)
        self._whole = block

    def c_store(self, block: int) -> CStore:
        return self._stores[block]


class ColumnCache:
    """What NeuronCache is where masks choose inputs: of dense models with stored weights.

    Args:
        file: The columns and rows.
        num_bytes: Memory for them, without `column_ring_bytes`; at least `smallest_memory`.
        policy: As of NeuronCache, but `static`.
        gamma: Factor of the sizes of what is not in memory, 0 to 1; 1 for the masks of the model itself.
    """

    wants_uses = False
    held_share = 0.0

    def __init__(self, file: NeuronFile, num_bytes: int, *, policy: str = "lru", gamma: float = 1.0) -> None:
        self.file, self.layout, self.gamma = file, file.layout, gamma
        inputs, down = part_layouts(file.layout)
        # In proportion to the projections, as DIP divides it.
        for_inputs = min(max(num_bytes * 2 // 3, smallest_memory(inputs)), num_bytes - smallest_memory(down))
        self.inputs, self.down = (
            PartCache(_PartFile(file.path, file.descriptor, part, file.factors), share, holding, policy, gamma)
            for part, share, holding in (
                (inputs, for_inputs // mmap.PAGESIZE * mmap.PAGESIZE, COLUMNS),
                (down, num_bytes - for_inputs, DOWN_ROWS),
            )
        )

    @property
    def _parts(self) -> tuple[PartCache, PartCache]:
        return self.inputs, self.down

    @property
    def neuron_bytes(self) -> int:
        return sum(one.neuron_bytes for one in self._parts)

    @property
    def slots(self) -> int:
        return sum(one.slots for one in self._parts)

    def hold(self) -> None:
        """Nothing is held but slots."""

    def matrices(self, block: int, dtype: torch.dtype) -> tuple[Matrix, Matrix, Matrix]:
        """gate and up by columns, [hidden, neurons], and transposed down, as the slots hold them."""
        layout = self.layout
        half = layout.neurons * dtype.itemsize
        gate, up = (self.inputs.slots_matrix(start, layout.neurons, dtype) for start in (0, half))
        return gate, up, self.down.slots_matrix(0, layout.hidden, dtype)

    def whole_views(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate, up and transposed down, [neurons, hidden], where `whole_block` puts them."""
        layout = self.layout
        half = layout.neurons * dtype.itemsize
        gate, up = (self.inputs.whole_matrix(start, layout.neurons, dtype).mT for start in (0, half))
        return gate, up, self.down.whole_matrix(0, layout.hidden, dtype)

    def whole_block(self, block: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for one in self._parts:
            one.read_whole(block)
        return self.whole_views(dtype)

    def note_uses(self, block: int, fired: NDArray[np.bool_], inputs: NDArray[np.float16] | None) -> None:
        """No policy needs them."""

    def store(self, block: int) -> ColumnStore:
        return ColumnStore(self, block)

    def raise_failure(self) -> None:
        for one in self._parts:
            one.raise_failure()

    @property
    def counts(self) -> NeuronReads:
        """Of columns and rows together, since the last `reset_counts`."""
        return self.inputs.counts + self.down.counts

    def reset_counts(self) -> None:
        for one in self._parts:
            one.reset_counts()

    def close(self) -> None:
        for one in self._parts:
            one.close()
        self.file.close()


class ColumnStore:
    """Tells the kernels where a block's columns and rows are, and what its masks prefer."""

    def __init__(self, cache: ColumnCache, block: int) -> None:
        self._cache, self._block = cache, block

    def attach(self, call: FfnCall) -> None:
        inputs, down = (one.c_store(self._block) for one in (self._cache.inputs, self._cache.down))
        call.store, call.input_store = ctypes.addressof(down), ctypes.addressof(inputs)
        call.gate.slots = call.up.slots = inputs.slots
        call.down_t.slots = down.slots

    def steer(self, call: FfnCall) -> None:
        if self._cache.gamma == 1:
            return
        parts = (call.gate_in_mask, self._cache.inputs), (call.up_in_mask, self._cache.inputs)
        for mask, cache in (*parts, (call.product_mask, self._cache.down)):
            if mask and mask.contents.rule == TOP_K:
                mask.contents.weights = cache.preferences[self._block].ctypes.data
