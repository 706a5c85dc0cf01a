"""Timing on CPU and GPU, and interleaved execution of training loops.

Several training loops run alternately in one process, so that other load on the machine slows all of them alike. Each loop runs
unmodified in its own thread and calls `InterleavedLoop.step` once a step; after each block of steps, this hands control to the
next loop. Only one loop runs at any time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from sparsify.runtime.build import kernels

OUT_OF_CACHE_BYTES = 256 << 20
"""Size of the weights that one round reads, so that none of them are still in the cache."""


class Clock:
    """Marks moments in the order of the work on a device."""

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        """Marks the current time; on a GPU, the time at which the work enqueued so far is done."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """Seconds between two marks. On a GPU this waits for the second mark."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1000
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start

    def prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same work without launch overhead: on a GPU, a CUDA graph captured after a first run."""
        run()
        if not self._gpu:
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


def read_data(data: torch.Tensor, threads: int) -> None:
    """Reads memory as fast as possible: every thread only sums what it reads."""
    library = None if data.is_cuda else kernels()
    if library is None:
        data.sum()
    else:
        library.sparsify_read(data.data_ptr(), data.numel(), threads)


TrainingLoop = Callable[["InterleavedLoop"], None]


class Finished(Exception):
    """Raised in a training loop after its last measured step."""


def work_seconds() -> float:
    """Seconds of CPU time of this process, since other processes share the cores; wall time with a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class InterleavedLoop:
    """Control of one loop that runs alternately with others."""

    def __init__(self, name: str, block_steps: int, blocks: int) -> None:
        self.name = name
        self.seconds: list[float] = []
        """Seconds per step in each measured block."""
        self.losses: list[float] = []
        """Losses of the first steps, if the loop records them."""
        self._block_steps, self._blocks = block_steps, blocks
        self._done_steps, self._warm = 0, False
        self._started = 0.0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False

    def step(self) -> None:
        """Called by the loop at the same point of every step; blocks while other loops run.

        Raises:
            Finished: When all blocks are measured.
        """
        if self._done_steps == self._block_steps or not self._started:
            self._end_block()
        self._done_steps += 1

    def _end_block(self) -> None:
        now = work_seconds()
        if self._warm:
            self.seconds.append((now - self._started) / self._block_steps)
        self._warm = self._started > 0
        if len(self.seconds) == self._blocks:
            raise Finished
        self._back.release()
        self._go.acquire()
        self._done_steps = 0
        self._started = work_seconds()

    def start(self, loop: TrainingLoop) -> None:
        def run() -> None:
            self._go.acquire()
            try:
                loop(self)
            except Finished:
                pass
            except BaseException as error:  # re-raised in the thread that waits for this one
                self._error = error
            self._ended = True
            self._back.release()

        threading.Thread(target=run, name=self.name, daemon=True).start()
        self.run_block()

    def run_block(self) -> None:
        if self._ended:
            return
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error


def run_interleaved(
    loops: Mapping[str, TrainingLoop],
    block_steps: int,
    blocks: int,
    on_progress: Callable[[str], object],
) -> dict[str, InterleavedLoop]:
    """Runs the loops alternately, block by block, in changing order; each trains until `InterleavedLoop.step` raises."""
    controls = {name: InterleavedLoop(name, block_steps, blocks) for name in loops}
    for name, loop in loops.items():
        on_progress(f"Setting up: {name}")
        controls[name].start(loop)
    names = list(loops)
    for block in range(blocks + 1):
        on_progress("Warming up" if block == 0 else f"Block {block} of {blocks}, {block_steps} steps each")
        shift = block % len(names)
        for name in names[shift:] + names[:shift]:
            controls[name].run_block()
    return controls


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The ratio of each pair of blocks measured one after the other."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    ordered = sorted(values)
    below = ordered[: (len(ordered) + 1) // 2]
    above = ordered[len(ordered) // 2 :]
    return median(ordered), median(below), median(above)
