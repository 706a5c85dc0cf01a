"""Time on a CPU and on a GPU, where work goes on after its call has returned."""

from __future__ import annotations

import time
from collections.abc import Callable

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
