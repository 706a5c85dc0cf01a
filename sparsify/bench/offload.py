"""`sparsify bench offload`: models larger than memory, decoded from a file in several ways within one limit on memory.

All ways read the same neurons from the same file, with the same memory for them, one after the other in one process, several rounds in
alternating order. Reads are real: they go past the page cache, or through one that a memory cgroup keeps within the same limit and that
is dropped before each; the system's own count of what it read from the disk is shown.
"""

from __future__ import annotations

import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel

from sparsify.bench.decode_shapes import SHAPES
from sparsify.bench.offload_model import KINDS, Firing, perfect_predictors, write_model
from sparsify.bench.timing import paired_ratios, quartiles
from sparsify.errors import RecipeError, check_choice
from sparsify.runtime import Acceleration, accelerate
from sparsify.runtime.memory_plan import smallest_memory
from sparsify.runtime.neuron_file import NeuronLayout
from sparsify.runtime.offload import peak_rss_bytes, rss_bytes
from sparsify.runtime.prefetch import Prefetch
from sparsify.runtime.stored_forwards import StoredForward
from sparsify.runtime.weights import FfnWeights, LayerPredictors

CGROUP = Path("/sys/fs/cgroup/memory")
"""Where version 1 of memory cgroups is usually mounted."""
DENSE, MAPPED = "dense, streamed", "dense, mmap"
OTHER_BYTES = 250_000_000
"""In a cgroup, besides weights: keys and values, the ring of chunks, and what steps need for a time."""


@dataclass(frozen=True)
class Way:
    """One way of decoding.

    Attributes:
        mapped: Rows are read through a mapping of the file, which the system reads and forgets as it likes.
    """

    name: str
    policy: str = "no_cache"
    prefetch: Prefetch = "none"
    dense: bool = False
    mapped: bool = False
    predicted: bool = False


WAYS = (
    Way(DENSE, dense=True),
    Way(MAPPED, dense=True, mapped=True),
    Way("exact, mmap", mapped=True),
    Way("exact, no cache"),
    Way("exact, LRU", "lru"),
    Way("exact, LFU", "lfu"),
    Way("predictor, no cache", predicted=True),
    Way("predictor, LRU", "lru", predicted=True),
    Way("predictor, LFU", "lfu", predicted=True),
    Way("predictor, LFU, prefetch by persistence", "lfu", "persistence", predicted=True),
    Way("predictor, LFU, prefetch by frequency", "lfu", "frequency", predicted=True),
)


class Measured(BaseModel):
    """What a way took in all rounds; medians, and bytes of all tokens measured divided by their number."""

    name: str
    ms_per_token: list[float]
    """Of each round."""
    read_mb_per_token: float
    """As the runtime counted; 0 of mappings."""
    disk_mb_per_token: float
    """As the system counted what this process read from the disk."""
    hit_rate: float | None
    over_fetch: float | None
    wait_share: float | None
    peak_mb: float
    """Most memory of the cgroup, page cache included, without what Python and torch had before; without a cgroup, of the process."""
    to_dense: tuple[float, float, float] | None = None
    """Times as fast as dense streaming of the same round: median and quartiles."""
    to_mmap: tuple[float, float, float] | None = None
    """Times as fast as dense decoding through a mapping of the same round."""


class OffloadBench(BaseModel):
    shape: str
    layers: int
    active: float
    skew: float
    model_gb: float
    ffn_gb: float
    neuron_gb: float
    """Memory for neurons."""
    limit_gb: float
    """Of the cgroup: everything that stays in memory, neurons, and OTHER_BYTES. Python and torch were there before."""
    base_gb: float = 0.0
    """Of Python and torch, which the cgroup does not count."""
    rank: int
    tokens: int
    rounds: int
    threads: int
    disk_mb_per_second: float
    """Of reads of one MB past the page cache, as many at once as the runtime has."""
    ways: list[Measured]
    left_out: str
    """Why ways are missing; empty if none is."""


@dataclass(frozen=True)
class OffloadPlan:
    """What is measured.

    Attributes:
        folder: Where the model and its neuron files are kept.
        memory_share: Memory for neurons as a share of all neurons.
        limit_share: Memory for everything, Python and torch included, as a share of the model; None for what `memory_share` needs.
        rank: Of predictors.
        warm_tokens: Decoded before those that are measured.
    """

    folder: Path
    shape: str
    layers: int
    firing: Firing
    memory_share: float
    rank: int
    warm_tokens: int
    tokens: int
    rounds: int
    threads: int
    only: tuple[str, ...] = ()
    limit_share: float | None = None


def bench_offload(plan: OffloadPlan, on_progress: Callable[[str], object]) -> OffloadBench:
    """Measures all ways. Raises UserError if a setting cannot be measured."""
    check_choice("--shape", plan.shape, tuple(SHAPES))
    if plan.rank < KINDS:
        raise RecipeError(f"--rank is {plan.rank}.", allowed=f"At least {KINDS}, one for each kind of tokens.")
    torch.set_num_threads(plan.threads)
    os.environ["SPARSIFY_NEURON_CACHE"] = str(plan.folder)
    model = plan.folder / f"{plan.shape}-{plan.layers}-{plan.firing.active:g}-{plan.firing.skew:g}"
    write_model(model, plan.shape, plan.layers, plan.firing, on_progress)
    shape = SHAPES[plan.shape]
    ffn = plan.layers * (shape.experts or (1, 1))[0] * 3 * shape.neurons * shape.hidden * 2
    ways = [one for one in WAYS if not plan.only or one.name in plan.only]
    base, for_neurons = rss_bytes(), round(plan.memory_share * ffn)
    for predicted in sorted({one.predicted for one in ways}):  # writes the files
        _opened(plan, model, Way("", predicted=predicted), ffn, 10**15, on_progress)
    results = {one.name: _Result() for one in ways}
    left_out = ""
    made = _opened(plan, model, WAYS[0], for_neurons, 10**15, on_progress)
    assert made.offloaded is not None
    resident = made.offloaded.resident_bytes()
    if plan.limit_share is not None:
        for_neurons = _neurons_within(
            plan, resident + ffn, resident + base, smallest_memory(made.offloaded.cache.layout)
        )
    speed = _disk_speed(made.offloaded.cache.file.path)
    limit = resident + for_neurons + OTHER_BYTES
    del made
    for number in range(plan.rounds):
        shift = number % len(ways)
        for way in ways[shift:] + ways[:shift]:
            on_progress(f"Round {number + 1} of {plan.rounds}: {way.name}")
            with _limited(limit + (_passing_bytes(plan) if way.dense else 0)) as group:
                if way.mapped and group is None:
                    left_out = "No memory cgroup can be made here (it needs root), so the page cache of mappings would not be limited."
                    continue
                _measure(plan, model, way, for_neurons, results[way.name], on_progress, group)
    return _collected(plan, ways, results, left_out, ffn, resident, for_neurons, limit, speed, base)


class _Result:
    def __init__(self) -> None:
        self.ms: list[float] = []
        self.read = self.disk = self.wait = 0.0
        self.tokens = self.needed = self.hits = self.over = 0
        self.peak = 0


def _neurons_within(plan: OffloadPlan, model: int, others: int, least: int) -> int:
    """Memory for neurons within `limit_share` of a model of so many bytes."""
    assert plan.limit_share is not None
    found = round(plan.limit_share * model) - others - OTHER_BYTES
    if found < least:
        share = (others + OTHER_BYTES + least) / model
        raise RecipeError(
            f"A limit of {plan.limit_share:g} of {model / 1e9:.1f} GB leaves {max(0, found) / 1e9:.2f} GB for neurons, and one "
            f"block needs {least / 1e9:.2f} GB.",
            allowed=f"--limit {share + 0.005:.2f} or more, with --shape {plan.shape} --layers {plan.layers}.",
            next_step="Give more layers, or a shape with experts: less of such a model is always in memory.",
        )
    return found


def _opened(
    plan: OffloadPlan, folder: Path, way: Way, for_neurons: int, limit: int, on_progress: Callable[[str], object]
) -> Acceleration:
    """The model decoded in a way. Predictors are in the memory for neurons."""

    def tell(text: str) -> None:
        on_progress(text)

    def predicted(model: Any, _: Any) -> LayerPredictors:
        return perfect_predictors(model.config, plan.firing, plan.rank)

    if way.predicted:
        shape = SHAPES[plan.shape]
        blocks = plan.layers * (shape.experts or (1, 1))[0]
        for_neurons -= blocks * plan.rank * (shape.hidden + shape.neurons) * 2
    if way.dense:
        for_neurons += _passing_bytes(plan)
    return accelerate(
        folder,
        memory=limit,
        neuron_memory=for_neurons,
        policy=way.policy,
        prefetch=way.prefetch,
        dense=way.dense,
        predictors=predicted if way.predicted else None,
        context_tokens=256,
        tell=tell,
        threads=plan.threads,
    )


def _passing_bytes(plan: OffloadPlan) -> int:
    """Of the rows of a block that dense decoding only passes through memory: it has them in addition, so that it holds as much."""
    shape = SHAPES[plan.shape]
    return 2 * shape.neurons * shape.hidden * 2


def _measure(
    plan: OffloadPlan,
    folder: Path,
    way: Way,
    for_neurons: int,
    into: _Result,
    on_progress: Callable[[str], object],
    group: Path | None,
) -> None:
    made = _opened(plan, folder, way, for_neurons, 10**15, on_progress)
    offloaded = made.offloaded
    assert offloaded is not None
    path = offloaded.cache.file.path
    _drop_pages(path)
    if way.mapped:
        _map_all(made, path)
    ids = torch.from_numpy(np.random.default_rng(7).integers(0, KINDS, plan.warm_tokens + plan.tokens))
    output: Any = None
    begin = disk = 0.0
    with torch.no_grad():
        for step, token in enumerate(ids):
            if step == plan.warm_tokens:
                made.reset()
                begin, disk = time.perf_counter(), _disk_bytes()
            past = None if output is None else output.past_key_values
            output = made.model(token.view(1, 1), past_key_values=past, use_cache=True)
    into.ms.append(1e3 * (time.perf_counter() - begin) / plan.tokens)
    into.disk += _disk_bytes() - disk
    into.tokens += plan.tokens
    counts = made.neurons
    assert counts is not None
    if not way.mapped:
        into.read += counts.bytes_read
        into.needed, into.hits = into.needed + counts.needed, into.hits + counts.hits
        into.over += counts.over_fetched
        into.wait += 1e3 * counts.wait_seconds
    into.peak = max(
        into.peak, peak_rss_bytes() if group is None else int((group / "memory.max_usage_in_bytes").read_text())
    )
    _drop_pages(path)


class MappedForward:
    """Matrices of a block that lie in a mapping of the neuron file."""

    def __init__(self, forward: StoredForward, memory: torch.Tensor, layout: NeuronLayout) -> None:
        self.forward, self.memory, self.layout = forward, memory, layout

    def weights(self, index: int, like: torch.Tensor) -> FfnWeights:
        made = type(self.forward).weights(self.forward, index, like)
        layout, block = self.layout, self.forward.first + index
        size, item = (layout.neurons, layout.hidden), like.element_size()
        first = self.memory.as_strided(size, (layout.row_bytes // item, 1), layout.rows_offset(block) // item)
        stride, start = layout.unit_bytes // item, layout.units_offset(block) // item
        up = self.memory.as_strided(size, (stride, 1), start)
        down = self.memory.as_strided(size, (stride, 1), start + layout.part_bytes // item)
        return replace(made, gate=first, up=up, down_t=down, store=None)


def _map_all(made: Acceleration, path: Path) -> None:
    """Makes all blocks read a mapping of the file."""
    offloaded = made.offloaded
    assert offloaded is not None
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch takes no memory that cannot be written
    memory = torch.frombuffer(mapped, dtype=torch.bfloat16)
    for forward in made.forwards:
        assert isinstance(forward, StoredForward)
        forward.weights = MappedForward(forward, memory, offloaded.cache.layout).weights
    offloaded.cache.hold = lambda: None


def _drop_pages(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_bytes() -> int:
    """What the system read from disks for this process."""
    with suppress(OSError):
        return int(re.findall(r"^read_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[0])
    return 0


def _disk_speed(path: Path, size: int = 1 << 29) -> float:
    """MB per second of reads of 1 MB past the page cache from all over a file."""
    from concurrent.futures import ThreadPoolExecutor

    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        places = np.random.default_rng(0).permutation(os.fstat(descriptor).st_size >> 20)[: size >> 20].tolist()
        rooms = [mmap.mmap(-1, 1 << 20) for _ in range(8)]

        def read(worker: int) -> int:
            return sum(os.preadv(descriptor, [rooms[worker]], place << 20) for place in places[worker :: len(rooms)])

        begin = time.perf_counter()
        with ThreadPoolExecutor(len(rooms)) as pool:
            done = sum(pool.map(read, range(len(rooms))))
        return done / 1e6 / (time.perf_counter() - begin)
    finally:
        os.close(descriptor)


@contextmanager
def _limited(num_bytes: int) -> Iterator[Path | None]:
    """This process in a memory cgroup of its own, if it may make one. What it had before is not counted there."""
    own = next((line.split(":", 2)[2] for line in _own_groups() if ":memory:" in line), "/")
    before, group = CGROUP / own.lstrip("/") / "cgroup.procs", CGROUP / f"sparsify-bench-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(num_bytes))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        yield None
        return
    try:
        yield group
    finally:
        before.write_text(str(os.getpid()))
        with suppress(OSError):  # what is left in memory moves to the group above
            group.rmdir()


def _own_groups() -> list[str]:
    with suppress(OSError):
        return Path("/proc/self/cgroup").read_text().splitlines()
    return []


def _collected(
    plan: OffloadPlan,
    ways: list[Way],
    results: dict[str, _Result],
    left_out: str,
    ffn: int,
    resident: int,
    for_neurons: int,
    limit: int,
    speed: float,
    base: int,
) -> OffloadBench:
    measured = []
    baselines = {name: results[name].ms for name in (DENSE, MAPPED) if name in results}
    for way in ways:
        one = results[way.name]
        if not one.ms:
            continue
        ratios = {
            name: quartiles(paired_ratios(ms, one.ms)) if len(ms) == len(one.ms) else None
            for name, ms in baselines.items()
        }
        measured.append(
            Measured(
                name=way.name,
                ms_per_token=one.ms,
                read_mb_per_token=one.read / one.tokens / 1e6,
                disk_mb_per_token=one.disk / one.tokens / 1e6,
                hit_rate=one.hits / one.needed if one.needed else None,
                over_fetch=one.over / one.needed if one.needed else None,
                wait_share=None if way.mapped else one.wait / one.tokens / (sum(one.ms) / len(one.ms)),
                peak_mb=one.peak / 1e6,
                to_dense=ratios.get(DENSE),
                to_mmap=ratios.get(MAPPED),
            )
        )
    return OffloadBench(
        shape=plan.shape,
        layers=plan.layers,
        active=plan.firing.active,
        skew=plan.firing.skew,
        model_gb=(ffn + resident) / 1e9,
        ffn_gb=ffn / 1e9,
        neuron_gb=for_neurons / 1e9,
        limit_gb=limit / 1e9,
        base_gb=base / 1e9,
        rank=plan.rank,
        tokens=plan.tokens,
        rounds=plan.rounds,
        threads=plan.threads,
        disk_mb_per_second=speed,
        ways=measured,
        left_out=left_out,
    )
