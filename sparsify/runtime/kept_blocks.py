"""Keeps the int8 or int4 blocks of a module's weights, and makes them anew when the weights change.

A change is what torch itself counts (an optimiser's step, load_state_dict, any operator in place), or other memory (a cast, a
move, another parameter). What is written through `.data` is not counted, so it is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from sparsify.runtime.blocks import BlockFormat, BlockMatrix, quantise

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
