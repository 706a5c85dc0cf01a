"""How long a decode takes on a device, from the slots that it finds in memory and those that it reads.

Each layer of each token, in order: the attention (and what else is always in memory) is read from memory; then, for each unit, the
layer waits for slots that are read late, or that were prefetched and have not arrived, and computes on all that it needs. When a layer
computes on a unit, flash begins to read what is prefetched for the same unit of the next layer, after what it has to read already. On a
device without concurrency a layer waits, then computes; with it, both take as long as the longer one. A device that gathers waits, then
computes on late slots as well. Without prefetch, latencies, pages and a rate of reads, on a device that does not gather, a token takes
what DIP's simulator (arXiv 2412.01380) says, per sequence

    static bytes / DRAM bandwidth + Σ (missed bytes / flash bandwidth + hit bytes / DRAM bandwidth),

or the larger of both under the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sparsify.simulation.device import Device
from sparsify.simulation.replay import Moves
from sparsify.simulation.trace import Fetch


@dataclass(frozen=True)
class Decode:
    """What a decode moved and how long it took.

    Attributes:
        tokens: How many.
        needed_bytes: Of the slots that tokens needed.
        hit_bytes: Of these, resident.
        ahead_bytes: Of these, prefetched.
        stall_bytes: Of these, read only when they were needed.
        prefetched_bytes: Of all slots that were prefetched, needed or not.
        flash_bytes: Read from flash, in whole pages, with what is streamed for each token.
        flash_reads: Number of reads.
        static_seconds: For what is always in memory.
        slots_seconds: For the slots that are in memory when they are needed.
        flash_seconds: Of waiting for flash.
        fixed_seconds: Whatever is read.
    """

    tokens: int
    needed_bytes: float
    hit_bytes: float
    ahead_bytes: float
    stall_bytes: float
    prefetched_bytes: float
    flash_bytes: float
    flash_reads: int
    static_seconds: float
    slots_seconds: float
    flash_seconds: float
    fixed_seconds: float

    @property
    def seconds(self) -> float:
        return self.static_seconds + self.slots_seconds + self.flash_seconds + self.fixed_seconds

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def hit_rate(self) -> float:
        """Share of the needed bytes that was resident; 1 if nothing was needed."""
        return self.hit_bytes / self.needed_bytes if self.needed_bytes else 1.0

    @property
    def recall(self) -> float:
        """Share of what was needed and not resident that was prefetched; 1 if all was resident."""
        missed = self.ahead_bytes + self.stall_bytes
        return self.ahead_bytes / missed if missed else 1.0

    @property
    def over_fetch(self) -> float:
        """Slots that were read over slots that had to be read, in bytes as stored; 1 if none had to be."""
        missed = self.ahead_bytes + self.stall_bytes
        return (self.prefetched_bytes + self.stall_bytes) / missed if missed else 1.0


def time_decode(device: Device, fetch: Fetch, moves: Moves, static_bytes: float, streamed_bytes: float = 0.0) -> Decode:
    """The decode of one sequence.

    Args:
        device: Where.
        fetch: What its slots are.
        moves: Of the slots, for each token, layer and unit.
        static_bytes: That a token reads from memory in any case, all layers.
        streamed_bytes: That a token reads from flash in any case, all layers: what should be in memory and does not fit.
    """
    return _Timeline(device, fetch, moves, static_bytes, streamed_bytes).run()


class _Timeline:
    def __init__(self, device: Device, fetch: Fetch, moves: Moves, static_bytes: float, streamed_bytes: float) -> None:
        self._device, self._moves = device, moves
        self._slot = [unit.slot_bytes for unit in fetch.units]
        self._page = [device.read_bytes(unit.slot_bytes) for unit in fetch.units]
        self._tokens, self._layers, self._units = moves.hits.shape
        self._static = device.dram_seconds(static_bytes) / self._layers
        self._stream_bytes = streamed_bytes / self._layers
        self._now = self._flash_free = 0.0
        self._streamed: float | None = None
        self._static_seconds = self._slots_seconds = self._flash_seconds = 0.0
        self._flash_bytes, self._flash_reads = 0.0, 0
        self._arrival: dict[tuple[int, int, int], float] = {}

    def run(self) -> Decode:
        for token in range(self._tokens):
            for layer in range(self._layers):
                self._begin_layer()
                for unit in range(self._units):
                    self._use(token, layer, unit)
            self._now += self._device.fixed_seconds
        moves, slot = self._moves, self._slot

        def total(slots: NDArray[np.int64]) -> float:
            by_unit = slots.sum((0, 1)).tolist()
            return sum(count * size for count, size in zip(by_unit, slot, strict=True))

        return Decode(
            tokens=self._tokens,
            needed_bytes=total(moves.hits + moves.ahead + moves.late),
            hit_bytes=total(moves.hits),
            ahead_bytes=total(moves.ahead),
            stall_bytes=total(moves.late),
            prefetched_bytes=total(moves.prefetched),
            flash_bytes=self._flash_bytes,
            flash_reads=self._flash_reads,
            static_seconds=self._static_seconds,
            slots_seconds=self._slots_seconds,
            flash_seconds=self._flash_seconds,
            fixed_seconds=self._tokens * self._device.fixed_seconds,
        )

    def _begin_layer(self) -> None:
        """The part of a layer that does not depend on masks. What is streamed is known beforehand: where flash and memory are read at
        once, it is read during the layer before.
        """
        self._static_seconds += self._static
        if self._stream_bytes:
            arrived = self._streamed if self._streamed is not None else self._read(self._stream_bytes, 1)
            self._wait(arrived, self._static)
            self._streamed = self._read(self._stream_bytes, 1) if self._device.concurrent else None
        self._now += self._static

    def _use(self, token: int, layer: int, unit: int) -> None:
        moves = self._moves
        hits, ahead, late = (int(one[token, layer, unit]) for one in (moves.hits, moves.ahead, moves.late))
        if self._device.places_seconds and hits + ahead + late:
            self._slots_seconds += self._device.places_seconds.value
            self._now += self._device.places_seconds.value
        finished = self._now
        if ahead:
            finished = max(finished, self._arrival.pop((token, layer, unit), finished))
        if late:
            finished = max(finished, self._read(late * self._page[unit], late))
        self._prefetch(token, layer, unit)
        if self._device.gathers:
            compute = self._device.slots_seconds((hits + ahead + late) * self._slot[unit])
            self._wait(finished, 0.0)
        else:  # what was prefetched is read from memory, as what was resident; what is late is computed on as it comes from flash
            compute = self._device.dram_seconds((hits + ahead) * self._slot[unit])
            self._wait(finished, compute)
        self._slots_seconds += compute
        self._now += compute

    def _wait(self, finished: float, compute: float) -> None:
        """Waits until then, less what is computed in the meantime if both are possible at once."""
        waited = max(0.0, finished - self._now)
        if self._device.concurrent:
            waited = max(0.0, waited - compute)
        self._flash_seconds += waited
        self._now += waited

    def _prefetch(self, token: int, layer: int, unit: int) -> None:
        """Begins to read what was guessed for the layer that comes next."""
        next_token, next_layer = (token, layer + 1) if layer + 1 < self._layers else (token + 1, 0)
        if next_token == self._tokens:
            return
        count = int(self._moves.prefetched[next_token, next_layer, unit])
        if count:
            self._arrival[next_token, next_layer, unit] = self._read(count * self._page[unit], count)

    def _read(self, num_bytes: float, reads: int) -> float:
        """When a batch of reads ends that begins as soon as flash is free."""
        self._flash_bytes += num_bytes
        self._flash_reads += reads
        self._flash_free = max(self._now, self._flash_free) + self._device.flash_seconds(num_bytes, reads)
        return self._flash_free
