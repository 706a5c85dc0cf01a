"""The neurons of a file that are in memory: some rows for good, the others in slots that a cache policy gives to neurons.

The kernels ask for the neurons of a block whose rows they are about to read; what is not there is read by threads, and the step waits.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from sparsify.models.quantised import BlockMatrix
from sparsify.runtime.block_store import ALL_ROWS, FETCH, FETCH_FAILED, SECOND_ROWS, BlockStore, CStore
from sparsify.runtime.cache_policies import CachePolicy, EvictingCache, cache_policy
from sparsify.runtime.file_reads import FileReads, NeuronReads, RowStream
from sparsify.runtime.memory_plan import CHUNKS, FIRST_SHARE, chunk_bytes, chunk_rows, plan_memory, ring_bytes
from sparsify.runtime.neuron_file import ALIGNMENT, NeuronFile
from sparsify.runtime.prefetch import Guesses, Prefetch, Seen
from sparsify.runtime.weights import Matrix

RUNTIME_POLICIES = ("no_cache", "static", "lru", "lfu")
SPARE_SHARE = 8
"""One slot of so many is for what is read ahead, if anything is."""
Slots = NDArray[np.int32]
Units = NDArray[np.intp]
Bytes = NDArray[np.uint8]


class NeuronCache:
    """Memory of neurons, and the reads that fill it.

    Args:
        file: The neurons.
        num_bytes: Memory for them, without `ring_bytes`; at least `smallest_memory`.
        experts: Blocks of a layer: they share the layer's slots.
        policy: One of RUNTIME_POLICIES, for each layer; `static` keeps those that fired most often in the prompts so far.
        prefetch: Which neurons of the next layer are read while this one is computed: `persistence` those of the last token,
            `frequency` those used most often so far, `cluster` and `low_rank` those that prefetchers say which are fitted to the
            prompts so far (`prefetch.py`; of dense models).
    """

    def __init__(
        self, file: NeuronFile, num_bytes: int, *, experts: int = 1, policy: str = "lru", prefetch: Prefetch = "none"
    ) -> None:
        layout = self.layout = file.layout
        self._factors = file.factors
        self.file = file
        self.plan = plan_memory(layout, num_bytes, layout.neurons // FIRST_SHARE)
        self.reads = FileReads(file)
        self.error: BaseException | None = None
        self._experts, self._prefetch = experts, prefetch
        self._memory, self._ring = mmap.mmap(-1, self.plan.num_bytes), mmap.mmap(-1, ring_bytes(layout))
        self.memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._at, self._ring_at = _address(self._memory), _address(self._ring)
        self.stream: RowStream | None = None
        if layout.layout == "apart":
            self.stream = RowStream(
                self.reads,
                self._ring_at,
                CHUNKS,
                chunk_bytes(layout),
                chunk_rows(layout),
                layout.row_bytes,
                ALIGNMENT,
            )
        layers, units = layout.blocks // experts, experts * layout.neurons
        self._tables: list[Slots] = [np.full(units, -1, np.int32) for _ in range(layers)]
        self._spare = self._least_spare()
        self._hot = [np.zeros(units, np.int64) for _ in range(layers)] if policy == "static" else []
        self._new_hot = False
        first = "no_cache" if self._hot else policy
        self._policies: list[CachePolicy] = [cache_policy(first, units, self._capacity()) for _ in range(layers)]
        self._free = np.empty(self.plan.num_bytes // layout.unit_bytes, np.int32)
        self._num_free = self._num_slots = 0
        self._transient: tuple[Slots, Units] | None = None
        self._needed_now: int | None = None
        self._whole: int | None = None
        self._guesses = Guesses(prefetch, layers, units)
        self._ahead: dict[int, tuple[int, Units, Slots]] = {}
        self._counts = NeuronReads()
        self._since = NeuronReads()
        self._failed = ctypes.c_int32()
        self._callback = FETCH(self._fetch)
        self._stores = [self._store(block) for block in range(layout.blocks)]
        if experts == 1:  # otherwise the router says which block is next
            for block, store in enumerate(self._stores):
                store.next = ctypes.addressof(self._stores[(block + 1) % layout.blocks])
        self._holds = False
        self.forget()

    def _capacity(self) -> int:
        layers = self.layout.blocks // self._experts
        return max(0, (self.plan.slots - self._spare) // layers)

    def _least_spare(self) -> int:
        """Slots that no layer keeps."""
        return self.plan.slots // SPARE_SHARE if self._prefetch != "none" else 0

    def _store(self, block: int) -> CStore:
        layout, table = self.layout, self._tables[block // self._experts]
        own = (block % self._experts) * layout.neurons
        return CStore(
            block=block,
            stream=None if self.stream is None else self.stream.handle.value,
            num_rows=layout.neurons,
            offset=layout.rows_offset(block),
            slots=table.ctypes.data + own * table.itemsize,
            fetch=self._callback,
            failed=ctypes.addressof(self._failed),
            holds=self._holding,
        )

    def hold(self) -> None:
        """Reads the rows that stay in memory, unless they are there, and fits what guesses: before a step, after a prompt."""
        self._guesses.fit()
        size = self.plan.held_rows * self.layout.row_bytes
        if self._holds or not size:
            return
        begin = self.plan.num_bytes - self.layout.blocks * size
        self.forget()
        for policy in self._policies:
            if isinstance(policy, EvictingCache):
                policy.capacity = self._capacity()
        memory = np.frombuffer(self._memory, np.uint8)

        def put(part: Bytes, at: int) -> None:
            memory[start + at : start + at + len(part)] = part

        for block, store in enumerate(self._stores):
            start = begin + block * size
            self._read_run(self.layout.rows_offset(block), size, put)
            store.held, store.num_held = self._at + start, self.plan.held_rows
        self._holds = True

    def _let_go(self) -> None:
        """Gives the memory of held rows to slots: all rows are streamed until `hold`."""
        for store in self._stores:
            store.num_held = 0
        self._holds = False

    # ---- what the kernels see ----

    def matrices(self, block: int, dtype: torch.dtype) -> tuple[Matrix, Matrix, Matrix]:
        """gate, up and transposed down as the slots hold them: row n is that of the neuron in slot n, once `attach` said so."""
        gate, up, down = (self._slots_of(name, dtype) for name in ("gate", "up", "down"))
        return gate, up, self._with_factors(down, block)

    def _with_factors(self, down: Matrix, block: int) -> Matrix:
        return replace(down, factors=self._factors[block]) if isinstance(down, BlockMatrix) else down

    def _slots_of(self, name: str, dtype: torch.dtype) -> Matrix:
        layout = self.layout
        if name not in layout.in_unit:  # from held rows and the ring, which the kernels know
            return self._matrix(self.memory, 0, layout.row_bytes, dtype)
        return self._matrix(self.memory, layout.in_unit.index(name) * layout.part_bytes, layout.unit_bytes, dtype)

    def _matrix(self, memory: torch.Tensor, start: int, stride: int, dtype: torch.dtype) -> Matrix:
        layout = self.layout
        if layout.weights == "stored":
            values = memory[: len(memory) // dtype.itemsize * dtype.itemsize].view(dtype)
            size = layout.neurons, layout.hidden
            return values.as_strided(size, (stride // dtype.itemsize, 1), start // dtype.itemsize)
        rows = memory.as_strided((layout.neurons, layout.row_bytes), (stride, 1), start)
        return BlockMatrix(rows, "int8" if layout.weights == "int8" else "int4", layout.hidden)

    @property
    def neuron_bytes(self) -> int:
        return self.plan.num_bytes

    @property
    def slots(self) -> int:
        return self.plan.slots

    @property
    def held_share(self) -> float:
        """Share of the rows that every step reads which are held for good."""
        return self.plan.held_rows / self.layout.neurons if self.layout.layout == "apart" else 0.0

    @property
    def _holding(self) -> int:
        return ALL_ROWS if self.layout.layout == "whole" else SECOND_ROWS

    def store(self, block: int) -> BlockStore:
        return BlockStore(self._stores[block], self.layout)

    # ---- prompts ----

    def whole_views(self, dtype: torch.dtype) -> tuple[Matrix, Matrix, Matrix]:
        """gate, up and transposed down where `whole_block` puts them."""
        size = self.layout.neurons * self.layout.row_bytes
        gate, up, down = (self._matrix(self.memory, i * size, self.layout.row_bytes, dtype) for i in range(3))
        return gate, up, down

    def whole_block(self, block: int, dtype: torch.dtype) -> tuple[Matrix, Matrix, Matrix]:
        """Reads a whole block, contiguous: gate, up and transposed down. They are valid until anything else is read, and what was in
        memory is gone.
        """
        layout = self.layout
        size = layout.neurons * layout.row_bytes
        gate, up, down = self.whole_views(dtype)
        down = self._with_factors(down, block)
        if self._whole == block:
            return gate, up, down
        self.forget()
        self._let_go()
        self._spare = self._least_spare()
        # Not through torch, which would count a change of the weights.
        pool = np.frombuffer(self._memory, np.uint8)
        whole = {name: pool[i * size : (i + 1) * size] for i, name in enumerate(("gate", "up", "down"))}
        rows = {name: one.reshape(layout.neurons, layout.row_bytes) for name, one in whole.items()}

        def put_rows(part: Bytes, at: int) -> None:
            whole[layout.first][at : at + len(part)] = part

        def put_units(part: Bytes, at: int) -> None:
            units, first = part.reshape(-1, layout.unit_bytes), at // layout.unit_bytes
            for place, name in enumerate(layout.in_unit):
                start = place * layout.part_bytes
                rows[name][first : first + len(units)] = units[:, start : start + layout.row_bytes]

        if layout.layout == "apart":
            self._read_run(layout.rows_offset(block), size, put_rows)
        units = chunk_bytes(layout) // layout.unit_bytes * layout.unit_bytes
        self._read_run(layout.units_offset(block), layout.neurons * layout.unit_bytes, put_units, units)
        self._whole = block
        return gate, up, down

    def _read_run(
        self, offset: int, num_bytes: int, put: Callable[[Bytes, int], None], piece: int | None = None
    ) -> None:
        """Reads a run of the file through the ring, and calls put(bytes, place) for its parts."""
        if self.stream is not None:
            self.stream.discard()
        room = chunk_bytes(self.layout)
        chunk = piece or room // ALIGNMENT * ALIGNMENT
        ring = np.frombuffer(self._ring, np.uint8)
        starts, tickets = range(0, num_bytes, chunk), dict[int, int]()

        def begin(index: int) -> None:
            size = min(chunk, -(-(num_bytes - starts[index]) // ALIGNMENT) * ALIGNMENT)
            at = self._ring_at + index % CHUNKS * room
            tickets[index] = self.reads.begin(np.array([offset + starts[index]]), np.array([at], np.uintp), size)

        try:
            for index in range(min(CHUNKS, len(starts))):
                begin(index)
            for index, start in enumerate(starts):
                self.reads.wait(tickets.pop(index))
                at = index % CHUNKS * room
                put(ring[at : at + min(chunk, num_bytes - start)], start)
                if index + CHUNKS < len(starts):
                    begin(index + CHUNKS)
        finally:
            for ticket in tickets.values():  # after an error: nothing may write into the ring later
                self._settle(ticket)

    def forget(self) -> None:
        """Empties the slots."""
        if self.stream is not None:
            self.stream.discard()
        self._drop_ahead()
        if self._needed_now is not None:  # a step was interrupted
            self._settle(self._needed_now)
        self._needed_now = self._transient = self._whole = None
        for table, policy in zip(self._tables, self._policies, strict=True):
            table[:] = -1
            policy.reset()
        self._num_free, self._num_slots = 0, self.plan.slots
        self._give(np.arange(self._num_slots, dtype=np.int32))

    def _settle(self, ticket: int) -> None:
        """Waits for reads that nobody needs any more."""
        try:
            self.reads.wait(ticket)
        except Exception as error:
            self.error = self.error or error

    def _drop_ahead(self) -> None:
        for ticket, _, _ in self._ahead.values():
            self._settle(ticket)
        self._ahead.clear()

    @property
    def wants_uses(self) -> bool:
        """Whether prompts are to tell which neurons fired: the policy `static`, or what prefetchers are fitted to."""
        return bool(self._hot) or self._guesses.examples is not None

    def note_uses(self, block: int, fired: NDArray[np.bool_], inputs: NDArray[np.float16] | None) -> None:
        """Adds which neurons of a block fired in a prompt, [tokens, neurons], and what the block read, [tokens, hidden]."""
        layer, expert = divmod(block, self._experts)
        if self._hot:
            own = expert * self.layout.neurons
            self._hot[layer][own : own + self.layout.neurons] += fired.sum(0)
            self._new_hot = True
        if inputs is not None:
            self._guesses.learn(layer, fired, inputs)

    def _choose_hot(self) -> None:
        """Makes the neurons that fired most often the ones that stay."""
        capacity = self._capacity()
        for layer, (uses, table) in enumerate(zip(self._hot, self._tables, strict=True)):
            hot = np.zeros(len(uses), np.bool_)
            hot[np.argsort(-uses, kind="stable")[:capacity]] = True
            self._release(table, np.flatnonzero((table >= 0) & ~hot))
            self._policies[layer] = cache_policy("static", len(uses), capacity, hot=hot)
        self._new_hot = False

    # ---- steps ----

    def _fetch(self, block: int, neurons: int, count: int) -> int:
        """What the kernels call, on the thread that began the step: 1 once the rows of the neurons are in their slots."""
        try:
            given = (ctypes.c_int32 * count).from_address(neurons) if count else ()
            layer, expert = divmod(block, self._experts)
            self._make_resident(layer, np.array(given, np.intp) + expert * self.layout.neurons)
        except BaseException as error:  # raised again when the step has ended
            self.error = error
            return 0
        return 1

    def _make_resident(self, layer: int, needed: Units) -> None:
        self._whole = None
        if self._transient is not None:
            self._release(*self._transient)
            self._transient = None
        if self._new_hot:
            self._choose_hot()
        table, policy, counts = self._tables[layer], self._policies[layer], self._counts
        absent = needed[table[needed] < 0]
        counts.needed += len(needed)
        counts.hits += len(needed) - len(absent)
        mask = np.zeros(len(table), np.bool_)
        mask[needed] = True
        step = policy.step(mask)
        self._release(table, step.evicted[table[step.evicted] >= 0])
        if layer in self._ahead:
            absent = self._take_ahead(layer, absent, mask)
        if len(absent) > self._num_free:
            self._make_room(layer, mask, len(absent) - self._num_free)
        slots = self._take(len(absent))
        start = time.perf_counter()
        self._needed_now = self._begin(layer, absent, slots)
        table[absent] = slots
        self._transient = table, needed[~policy.resident[needed]]
        self.reads.wait(self._needed_now)
        self._needed_now = None
        counts.wait_seconds += time.perf_counter() - start
        counts.unit_bytes += len(absent) * self.layout.unit_bytes
        counts.stall_bytes += len(absent) * self.layout.unit_bytes
        if self._prefetch != "none":
            self._guesses.use(layer, needed)
            self._read_ahead((layer + 1) % len(self._tables), Seen(mask, self._inputs(layer), None))

    def _take(self, count: int) -> Slots:
        self._num_free -= count
        return self._free[self._num_free : self._num_free + count].copy()

    def _give(self, slots: Slots) -> None:
        self._free[self._num_free : self._num_free + len(slots)] = slots
        self._num_free += len(slots)

    def _release(self, table: Slots, units: Units) -> None:
        self._give(table[units])
        table[units] = -1

    def _begin(self, layer: int, units: Units, slots: Slots, *, ahead: bool = False) -> int:
        layout = self.layout
        experts, neurons = np.divmod(units, layout.neurons)
        first = layout.units_offset(layer * self._experts)
        offsets = first + experts * layout.block_bytes + neurons * layout.unit_bytes
        addresses = slots.astype(np.uintp) * np.uintp(layout.unit_bytes) + np.uintp(self._at)
        return self.reads.begin(offsets, addresses, layout.unit_bytes, ahead=ahead)

    def _make_room(self, layer: int, mask: NDArray[np.bool_], lacking: int) -> None:
        """Frees slots for a token that needs more than its layer may keep: all others are emptied, and from now on layers keep
        less, so that it does not happen again for as many. If that is not enough, held rows make room, and fewer of them return.
        """
        self._spare = min(self.plan.slots, self._spare + lacking + lacking // 4)
        for _, units, ahead in self._ahead.values():
            self._give(ahead)
            self._counts.over_fetched += len(units)
        self._drop_ahead()
        for other, (table, policy) in enumerate(zip(self._tables, self._policies, strict=True)):
            kept = mask if other == layer else np.zeros_like(mask)
            self._release(table, np.flatnonzero((table >= 0) & ~kept))
            policy.reset()
            policy.capacity = min(policy.capacity, self._capacity())
        self._new_hot = bool(self._hot)
        lacking = int((self._tables[layer][mask] < 0).sum()) - self._num_free
        if lacking > 0:
            needed = int(mask.sum())
            self._let_go()
            self._give(np.arange(self._num_slots, self._num_slots + lacking, dtype=np.int32))
            self._num_slots += lacking
            self.plan = plan_memory(self.layout, self.plan.num_bytes, min(self.layout.neurons, needed + needed // 4))

    # ---- ahead of use ----

    def _inputs(self, layer: int) -> NDArray[np.float32] | None:
        """What a layer's block, or its first expert, reads in this step, of the first token: [hidden]."""
        at = self._stores[layer * self._experts].x
        return None if not at else np.ctypeslib.as_array((ctypes.c_float * self.layout.hidden).from_address(at))

    def _read_ahead(self, layer: int, seen: Seen) -> None:
        """Begins to read what a layer will probably need, into slots that are free."""
        likely = None if layer in self._ahead else self._guesses.of(layer, seen)
        if likely is None:
            return
        units = np.sort(likely[self._tables[layer][likely] < 0])[: self._num_free]
        if len(units):
            slots = self._take(len(units))
            self._ahead[layer] = self._begin(layer, units, slots, ahead=True), units, slots
            self._counts.unit_bytes += len(units) * self.layout.unit_bytes

    def _take_ahead(self, layer: int, absent: Units, mask: NDArray[np.bool_]) -> Units:
        """Gives the neurons that were read ahead and are needed their slots; returns those still absent."""
        ticket, units, slots = self._ahead.pop(layer)
        start = time.perf_counter()
        self.reads.wait(ticket)
        self._counts.wait_seconds += time.perf_counter() - start
        used, table = mask[units] & (self._tables[layer][units] < 0), self._tables[layer]
        table[units[used]] = slots[used]
        self._give(slots[~used])
        self._counts.ahead += int(used.sum())
        self._counts.over_fetched += int((~used).sum())
        return absent[table[absent] < 0]

    # ---- afterwards ----

    def __del__(self) -> None:
        if hasattr(self, "_stores"):
            self.close()

    def raise_failure(self) -> None:
        """Raises what made a step fail, once; the slots are emptied, since some hold nothing."""
        code, error = self._failed.value, self.error
        if not code and error is None:
            return
        self._failed.value, self.error = 0, None
        self.forget()
        if error is None and code == FETCH_FAILED:  # nothing but a signal's handler raises before `_fetch` begins
            raise KeyboardInterrupt
        raise self.reads.failure(code) if error is None else error

    @property
    def counts(self) -> NeuronReads:
        """Since the last `reset_counts`."""
        return self._total() - self._since

    def reset_counts(self) -> None:
        self._since = self._total()

    def _total(self) -> NeuronReads:
        total = NeuronReads(**vars(self._counts))
        if self.stream is not None:
            total.streamed_bytes, waited = self.stream.counts()
            total.wait_seconds += waited
        return total

    def close(self) -> None:
        """Ends the reading threads and closes the file; the memory stays as long as views of it."""
        if not self.reads.handle:
            return
        self._drop_ahead()
        if self.stream is not None:
            self.stream.close()
        self.reads.close()
        self.file.close()


def _address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
