"""Which weights each token of a decode needs: masks over slots, and how many bytes a slot has.

What is fetched as a whole, a slot, depends on what the masks of a model let a token skip (`units_of`):

| fetch          | slot, and bytes of it at hidden size d                   | needed by a token                      | always in memory     |
|----------------|----------------------------------------------------------|----------------------------------------|----------------------|
| `neurons`      | a neuron's rows of gate and up, column of down: 3 d      | where the product is not zero          | nothing              |
| `gate_first`   | its row of up and column of down: 2 d                    | where the gate's factor is not zero    | gate                 |
| `down`         | its column of down: d                                    | where the product is not zero          | gate and up          |
| `inputs`       | an input's columns of gate and up; a neuron's of down    | where the input, the product is kept   | nothing              |
| `dense`        | as `neurons`                                             | all, of the experts that are routed to | nothing              |

`neurons` is what a predictor that is never wrong, or a mask by proxy, fetches. In a mixture of experts a slot belongs to an expert,
and the caches of a layer hold slots of all of its experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sparsify.runtime.memory_plan import FIRST_SHARE
from sparsify.simulation.footprint import Bits, ModelShape

Masks = NDArray[np.bool_]
"""Of one unit in one layer, [tokens, slots]."""

FETCHES = ("neurons", "gate_first", "down", "inputs", "dense")


@dataclass(frozen=True)
class Unit:
    """What a layer fetches slot by slot, in the order in which the layer needs it.

    Attributes:
        name: `neurons`, `inputs` or `down`.
        slots: Of a layer.
        slot_bytes: Of one slot.
        projections: How many of the three projections it holds: memory is divided in proportion.
    """

    name: str
    slots: int
    slot_bytes: float
    projections: int


@dataclass(frozen=True)
class Fetch:
    """What a model keeps in memory and what it fetches.

    Attributes:
        name: One of FETCHES.
        units: Of each layer.
        static_bytes: Feed-forward weights that always stay in memory, all layers and experts.
        static_read_bytes: Those of them that a token reads.
    """

    name: str
    units: tuple[Unit, ...]
    static_bytes: float
    static_read_bytes: float


@dataclass(frozen=True)
class LayerTrace:
    """What the tokens of one decode need of one layer.

    Attributes:
        masks: Of each unit, in the order of `Fetch.units`.
        inputs: What its feed-forward block reads, [tokens, hidden]; None if that was not recorded.
    """

    masks: Sequence[Masks]
    inputs: NDArray[np.float16] | None = None


class Trace(Protocol):
    """What the tokens of one decode need.

    Attributes:
        tokens: How many there are.
    """

    @property
    def tokens(self) -> int: ...

    def layers(self) -> Iterator[LayerTrace]:
        """Every layer in order; may be iterated repeatedly. A trace need not hold all of them at once."""
        ...


@dataclass(frozen=True)
class RecordedTrace:
    """A trace in memory."""

    recorded: Sequence[LayerTrace]

    @property
    def tokens(self) -> int:
        return len(self.recorded[0].masks[0])

    def layers(self) -> Iterator[LayerTrace]:
        return iter(self.recorded)


def units_of(fetch: str, shape: ModelShape, bits: Bits) -> Fetch:
    """The units of a model of that shape.

    Raises:
        ValueError: If the fetch is unknown.
    """
    row = bits.ffn / 8 * shape.hidden
    static_projections = {"gate_first": 1, "down": 2}.get(fetch, 0)
    whole = shape.layers * row * shape.neurons * static_projections
    static = whole * shape.experts, whole * shape.experts_per_token
    if fetch == "inputs":
        column = bits.ffn / 8 * shape.neurons
        inputs = Unit("inputs", shape.experts * shape.hidden, 2 * column, 2)
        return Fetch(fetch, (inputs, Unit("down", shape.slots, row, 1)), *static)
    if fetch not in FETCHES:
        raise ValueError(f"No fetch {fetch!r}; there are {', '.join(FETCHES)}")
    fetched = 3 - static_projections
    return Fetch(fetch, (Unit("neurons", shape.slots, fetched * row, fetched),), *static)


@dataclass(frozen=True)
class Division:
    """How the memory for feed-forward weights is divided.

    Attributes:
        held_share: Share of `Fetch.static_bytes` that memory holds; the rest is streamed.
        capacities: Slots of each unit that a layer's caches hold.
    """

    held_share: float
    capacities: list[int]


def divide(fetch: Fetch, shape: ModelShape, num_bytes: float, most_needed: int | None = None) -> Division:
    """What every token reads comes first, but for the slots of some of a block's neurons, as in `runtime.memory_plan`.

    Args:
        fetch: What is fetched.
        shape: Of the model.
        num_bytes: Memory for feed-forward weights.
        most_needed: Where a layer computes on nothing before all its slots are in memory (`Device.gathers`), the most that a token
            needs of a layer: caches that are smaller give up slots for it, as in `runtime.neuron_cache`.
    """
    held = 1.0
    if fetch.static_bytes:
        first = sum(unit.slots * unit.slot_bytes for unit in fetch.units) / (FIRST_SHARE * shape.experts)
        held = min(1.0, max(0.0, num_bytes - first) / fetch.static_bytes)
    slots = capacities(fetch, shape.layers, num_bytes - held * fetch.static_bytes)
    if most_needed is not None and len(slots) == 1 and slots[0] < most_needed:
        slots = [max(0, slots[0] - round(1.25 * (most_needed - slots[0])) // shape.layers)]
        slots = [0] if slots[0] * shape.layers < most_needed else slots
    return Division(held, slots)


def capacities(fetch: Fetch, layers: int, num_bytes: float) -> list[int]:
    """Slots of each unit that a layer's caches hold, of so many bytes for all layers: equal shares for each projection."""
    projections = sum(unit.projections for unit in fetch.units) * layers
    share = num_bytes / projections
    return [min(unit.slots, int(share * unit.projections / unit.slot_bytes)) for unit in fetch.units]
