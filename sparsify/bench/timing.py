"""Time on a CPU and on a GPU, where work goes on after its call has returned.

Several training loops in one process that take turns, so that a busy machine slows all of them alike.

Each loop runs unchanged in a thread of its own. Once a step it calls its turn's `step`, which every few steps lets the next loop
go on and waits. Only one of them ever runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch


class Clock:
    """Marks moments in the order of the work on a device.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str) -> None:
        self._gpu = device == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        """This moment; on a GPU, that at which the device has done what it was given before."""
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        """Seconds between two marks. On a GPU this waits for the second."""
        if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
            end.synchronize()
            return start.elapsed_time(end) / 1000
        assert isinstance(start, float)
        assert isinstance(end, float)
        return end - start

    def prepared(self, run: Callable[[], object]) -> Callable[[], object]:
        """The same work without what starting it costs: on a GPU a graph of it, after it ran once."""
        run()
        if not self._gpu:
            return run
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay


TrainingLoop = Callable[["Turn"], None]


class Finished(Exception):
    """Raised out of a training loop after its last measured step."""


def clock() -> float:
    """Seconds: of this process's own work on a CPU, where others share the cores, and of the wall where a GPU works."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Turn:
    """One loop's place in the round.

    Args:
        name: What it is called.
        block_steps: Steps of one measured block.
        blocks: How many blocks are measured, after a first one that warms up.
    """

    def __init__(self, name: str, block_steps: int, blocks: int) -> None:
        self.name = name
        self.seconds: list[float] = []
        """Of one step in each measured block."""
        self.losses: list[float] = []
        """Of the first steps, where the loop tells them."""
        self._block_steps, self._blocks = block_steps, blocks
        self._done_steps, self._warm = 0, False
        self._started = 0.0
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False

    def step(self) -> None:
        """Called by the loop at the same point of every step; returns when it may go on.

        Raises:
            Finished: When all blocks are measured.
        """
        if self._done_steps == self._block_steps or not self._started:
            self._end_block()
        self._done_steps += 1

    def _end_block(self) -> None:
        now = clock()
        if self._warm:
            self.seconds.append((now - self._started) / self._block_steps)
        self._warm = self._started > 0
        if len(self.seconds) == self._blocks:
            raise Finished
        self._back.release()
        self._go.acquire()
        self._done_steps = 0
        self._started = clock()

    def start(self, loop: TrainingLoop) -> None:
        """Sets the loop up, as far as its first step."""

        def run() -> None:
            self._go.acquire()
            try:
                loop(self)
            except Finished:
                pass
            except BaseException as error:  # handed to the thread that waits for it
                self._error = error
            self._ended = True
            self._back.release()

        threading.Thread(target=run, name=self.name, daemon=True).start()
        self.go()

    def go(self) -> None:
        """Lets the loop run one block."""
        if self._ended:
            return
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error


def take_turns(
    loops: Mapping[str, TrainingLoop],
    block_steps: int,
    blocks: int,
    on_progress: Callable[[str], object],
) -> dict[str, Turn]:
    """Runs the loops block by block, each time in another order.

    Args:
        loops: Functions that train until `Turn.step` raises.
        block_steps: Steps of a block.
        blocks: Measured blocks of each loop.
        on_progress: Told what is going on.

    Returns:
        Their turns, with the seconds of a step in each block.
    """
    turns = {name: Turn(name, block_steps, blocks) for name in loops}
    for name, loop in loops.items():
        on_progress(f"Setting up: {name}")
        turns[name].start(loop)
    names = list(loops)
    for block in range(blocks + 1):
        on_progress(
            "Warming up" if block == 0 else f"Block {block} of {blocks}, {block_steps} steps each"
        )
        shift = block % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].go()
    return turns


def paired_ratios(numerator: Sequence[float], denominator: Sequence[float]) -> list[float]:
    """The ratio of each pair of blocks that were measured one after the other."""
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def middle_half(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, first and third quartile."""
    ordered = sorted(values)
    below = ordered[: (len(ordered) + 1) // 2]
    above = ordered[len(ordered) // 2 :]
    return median(ordered), median(below), median(above)
