"""The ranks of a run answer together, each with the whole model that it trains.

The first rank hands out work and takes in answers, as `Workers` does. They talk through the key-value store that the process
group met in, and not by collectives: whoever waits looks into the store again and again, so that no time-out ends it however
long the first rank reads data or looks for overlaps, and a rank that is asked to stop is heard by all.
"""

from __future__ import annotations

import itertools
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    PrefixStore,
    _get_default_store,  # pyright: ignore[reportPrivateUsage]
)

from sparsify.evaluation.worker import Measurer, Method

POLL_SECONDS = 0.05
AHEAD = 2
"""Items that wait for each rank beside the one that it answers, so that none is idle while the first answers its own."""
_numbers = itertools.count()


class Stopped(Exception):
    """A rank was asked to stop before the suite was done."""


class Meeting:
    """One suite that all ranks of the process group come together for; every rank makes one, in the same order.

    Args:
        stop_requested: Whether this rank was asked to stop.
    """

    def __init__(self, stop_requested: Callable[[], bool]) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._store: Any = PrefixStore(f"suite/{next(_numbers)}", _get_default_store())
        self._stop_requested, self._said = stop_requested, False

    def check(self) -> None:
        """The first rank looks up here and there.

        Raises:
            Stopped: If a rank was asked to stop.
        """
        if self._stop_requested() or self._store.check(["stop"]):
            raise Stopped

    def put(self, key: str, value: Any) -> None:
        """Leaves something for another rank; ours alone can write into the store, so pickles are safe in it."""
        self._store.set(key, pickle.dumps(value))

    def take(self, key: str) -> Any:
        """Takes what another rank leaves, as soon as it is there.

        Raises:
            Stopped: If a rank was asked to stop.
        """
        while not self._store.check([key]):
            self.check()
            time.sleep(POLL_SECONDS)
        return self._taken(key)

    def end(self, *, finished: bool) -> None:
        """The first rank lets the others go on."""
        self.put("end", finished)

    def follow(self, answer: Callable[[Any], Any] | None = None) -> bool:
        """Any other rank: answers what it is handed until the first one ends the meeting.

        Returns:
            Whether the suite was finished; False when a rank was asked to stop.
        """
        number = 0
        while not self._store.check(["end"]):
            asked = f"ask/{self.rank}/{number}"
            if self._stop_requested() and not self._said:
                self._store.set("stop", b"1")
                self._said = True
            if answer is not None and self._store.check([asked]):
                self.put(f"answer/{self.rank}/{number}", answer(self._taken(asked)))
                number += 1
            else:
                time.sleep(POLL_SECONDS)
        return pickle.loads(self._store.get("end"))

    def _taken(self, key: str) -> Any:
        value = pickle.loads(self._store.get(key))
        self._store.delete_key(key)
        return value


class Ranks:
    """Context manager on the first rank that maps methods of a Measurer over items, with the others' help.

    Args:
        meeting: Where they are; each of the others follows it with `answer_with(measurer)`.
        measurer: The first rank's own.
        device: Type of device that all of them answer on.
    """

    def __init__(self, meeting: Meeting, measurer: Measurer, device: str) -> None:
        self._meeting, self._own, self.device = meeting, measurer, device
        self._asked, self._taken = [0] * meeting.world, [0] * meeting.world

    def __enter__(self) -> Self:
        self._own.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._own.__exit__()

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What a method of Measurer returns for the arguments of each item, in their order.

        Raises:
            Stopped: If a rank was asked to stop.
        """
        world, handed_out = self._meeting.world, 0
        for place, item in enumerate(items):
            while handed_out < min(len(items), place + (1 + AHEAD) * world):
                self._ask(handed_out % world, (method, items[handed_out]))
                handed_out += 1
            self._meeting.check()
            rank = place % world
            yield self._take(rank) if rank else getattr(self._own, method)(*item)

    def _ask(self, rank: int, question: tuple[Method, tuple[Any, ...]]) -> None:
        if rank:
            self._meeting.put(f"ask/{rank}/{self._asked[rank]}", question)
            self._asked[rank] += 1

    def _take(self, rank: int) -> Any:
        answer = self._meeting.take(f"answer/{rank}/{self._taken[rank]}")
        self._taken[rank] += 1
        return answer


def answer_with(measurer: Measurer) -> Callable[[tuple[Method, tuple[Any, ...]]], Any]:
    """What a rank follows a meeting with."""
    return lambda question: getattr(measurer, question[0])(*question[1])
