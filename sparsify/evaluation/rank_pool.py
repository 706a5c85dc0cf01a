"""Evaluation on the ranks of a running training, each of which holds the whole model.

Rank 0 distributes requests and collects outputs, like `ProcessPool` does with processes. The ranks communicate through the
key-value store of the process group rather than by collectives: every wait polls the store, so that no collective times out
while rank 0 reads data or searches for overlaps, and so that a stop request on any rank reaches all of them.

The store has no password: whoever reaches its port can write to it. So values are JSON, of which only the named methods are
called, and no pickle.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, get_args

import numpy as np
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _get_default_store,  # pyright: ignore[reportPrivateUsage]
)

from sparsify.evaluation.harness import Chunk
from sparsify.evaluation.metrics import Score
from sparsify.evaluation.results import Sample
from sparsify.evaluation.subject import Counts
from sparsify.evaluation.worker_pool import EvalWorker, Method
from sparsify.mixture.sequences.reader import FIELDS, PackedSequence
from sparsify.runs.run_folder import POLL_SECONDS

AHEAD = 2
"""Requests queued for each rank in addition to its current one, so that no rank waits while rank 0 runs its own."""
_queue_numbers = itertools.count()


class Stopped(Exception):
    """A rank was stopped before the suite was finished."""


class RankQueue:
    """Work queue of one suite over the process group. Every rank creates its queues in the same order."""

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store: Any = PrefixStore(f"suite/{next(_queue_numbers)}", _get_default_store())
        self._stop_requested, self._stop_sent = stop_requested, False

    def check(self) -> None:
        """On rank 0: looks for a stop request of any rank.

        Raises:
            Stopped: If a rank received a stop request.
        """
        if self._stop_requested() or self._store.check(["stop"]):
            raise Stopped

    def put(self, key: str, value: Any) -> None:
        """Stores a JSON value for another rank."""
        self._store.set(key, json.dumps(value))

    def take(self, key: str) -> Any:
        """Waits for a value of another rank and removes it from the store.

        Raises:
            Stopped: If a rank received a stop request.
        """
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL_SECONDS)
        return self._pop(key)

    def end(self, *, finished: bool) -> None:
        """On rank 0: releases the other ranks from `serve`."""
        self.put("end", finished)

    def serve(self, run: Callable[[Any], Any] | None = None) -> bool:
        """On any other rank: runs the requests it receives until rank 0 ends the suite.

        Returns:
            Whether the suite was finished; False when a rank received a stop request.
        """
        number = 0
        while not self._store.check(["end"]):
            request = f"request/{self.rank}/{number}"
            if self._stop_requested() and not self._stop_sent:
                self._store.set("stop", b"1")
                self._stop_sent = True
            if run is not None and self._store.check([request]):
                self.put(f"output/{self.rank}/{number}", run(self._pop(request)))
                number += 1
            else:
                time.sleep(POLL_SECONDS)
        return json.loads(self._store.get("end")) is True

    def _pop(self, key: str) -> Any:
        value = json.loads(self._store.get(key))
        self._store.delete_key(key)
        return value


class RankPool:
    """Context manager on rank 0 that maps methods of an EvalWorker over items, with the help of the other ranks.

    Args:
        queue: The queue; each other rank calls `queue.serve(run_on(worker))`.
    """

    def __init__(self, queue: RankQueue, worker: EvalWorker, device: str) -> None:
        self._queue, self._own, self.device = queue, worker, device
        self._sent, self._taken = [0] * queue.world, [0] * queue.world

    def __enter__(self) -> Self:
        self._own.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._own.__exit__()

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        # Items go round-robin over the ranks, up to AHEAD rounds ahead of the one whose result is yielded.
        world, sent = self._queue.world, 0
        for index, item in enumerate(items):
            while sent < min(len(items), index + (1 + AHEAD) * world):
                self._send(sent % world, (method, items[sent]))
                sent += 1
            self._queue.check()
            rank = index % world
            yield _output(method, self._take(rank)) if rank else getattr(self._own, method)(*item)

    def _send(self, rank: int, request: tuple[Method, tuple[Any, ...]]) -> None:
        if rank:
            self._queue.put(f"request/{rank}/{self._sent[rank]}", _plain_request(*request))
            self._sent[rank] += 1

    def _take(self, rank: int) -> Any:
        output = self._queue.take(f"output/{rank}/{self._taken[rank]}")
        self._taken[rank] += 1
        return output


def run_on(worker: EvalWorker) -> Callable[[Any], Any]:
    """Runs requests as they come from the queue, and returns outputs for it."""

    def run(plain: Any) -> Any:
        method, item = _request(plain)
        return _plain_output(method, getattr(worker, method)(*item))

    return run


def _plain_request(method: Method, item: tuple[Any, ...]) -> list[Any]:
    if method == "sequence":
        (sequence,) = item
        return [method, sequence.source, *(getattr(sequence, field).tolist() for field in FIELDS)]
    return [method, *item]


def _request(plain: Any) -> tuple[Method, tuple[Any, ...]]:
    method, *item = plain
    if method not in get_args(Method):
        raise ValueError(f"{method!r} is not a request of a rank")
    if method == "sequence":
        source, *arrays = item
        fields = {field: np.array(values, dtype=np.int64) for field, values in zip(FIELDS, arrays, strict=True)}
        return method, (PackedSequence(source, **fields),)
    if method == "chunk":
        kind, arguments = item
        return method, (kind, [tuple(one) for one in arguments])
    return method, tuple(item)


def _plain_output(method: Method, output: Any) -> Any:
    return output.model_dump() if method == "sample" else output  # the others are named tuples


def _output(method: Method, plain: Any) -> Any:
    if method == "sample":
        return Sample(**plain)
    if method == "sequence":
        score, counts = plain
        return Score(*score), Counts(*counts)
    outputs, counts, truncated_requests = plain
    return Chunk(outputs, Counts(*counts), truncated_requests)
