"""How the memory for neurons is divided, and how large the ring is that streamed rows pass through."""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from sparsify.runtime.neuron_file import ALIGNMENT, NeuronLayout

FIRST_SHARE = 8
"""Slots begin with those of an eighth of a block's neurons: more than a token needs where 90% are zeros. One that needs more gets more."""
CHUNK_BYTES, CHUNKS = 1 << 21, 16
"""Of the ring that streamed rows pass through: while the single neurons of one layer are read, so much of the next layer's rows is."""


@dataclass(frozen=True)
class MemoryPlan:
    """How the memory for neurons is divided: slots first, held rows behind them.

    Attributes:
        num_bytes: Of all.
        held_rows: Of each block, rows of the projection that is computed in full.
        slots: Units of neurons.
    """

    num_bytes: int
    held_rows: int
    slots: int


def ring_bytes(layout: NeuronLayout) -> int:
    return CHUNKS * chunk_bytes(layout)


def chunk_rows(layout: NeuronLayout) -> int:
    return max(1, min(layout.neurons, CHUNK_BYTES // layout.row_bytes))


def chunk_bytes(layout: NeuronLayout) -> int:
    rows = chunk_rows(layout) * layout.row_bytes + 2 * ALIGNMENT
    return -(-max(rows, layout.unit_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE


def smallest_memory(layout: NeuronLayout) -> int:
    """Bytes: a whole block must fit, since a prompt needs all of it, and a token may."""
    return _pages(layout.whole_bytes)


def plan_memory(layout: NeuronLayout, num_bytes: int, units: int) -> MemoryPlan:
    """Divides memory: slots for what a token needs of a block, then rows that every step reads, then more slots. A byte of the
    rows saves a byte in every step, one of slots only when its neuron fires.

    Args:
        layout: Of the file.
        num_bytes: At least `smallest_memory`.
        units: Slots to begin with.
    """
    assert num_bytes >= smallest_memory(layout)
    most = layout.blocks * layout.neurons * layout.unit_bytes
    if layout.layout == "whole":
        num_bytes = min(_pages(num_bytes), max(_pages(most), smallest_memory(layout)))
        return MemoryPlan(num_bytes, 0, num_bytes // layout.unit_bytes)
    row = layout.blocks * layout.row_bytes
    num_bytes = min(_pages(num_bytes), _pages(most + layout.neurons * row))
    held = min(layout.neurons, max(0, num_bytes - units * layout.unit_bytes) // row)
    return MemoryPlan(num_bytes, held, (num_bytes - held * row) // layout.unit_bytes)


def _pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
