"""Tokenising ahead of training, in processes of its own.

Training begins when every source has something to give, and continues while the rest is tokenised. The same sequences come out
in the same order as when everything lay in the cache before.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Self

from sparsify.launch import ingest_worker
from sparsify.launch.child import Child, module_command
from sparsify.mixture.tokens.ingest import Ingest, Progress
from sparsify.runs.run_folder import POLL_SECONDS, RunFolder

GRACE_SECONDS = 10.0


class Feeder:
    """Keeps the ingest processes of a run while the `with` block lasts.

    Args:
        run: The run's folder; its recipe is written and its tokenizer lies in `initial/`.
    """

    def __init__(
        self,
        run: RunFolder,
        ingests: Mapping[str, Ingest],
        num_processes: int,
        on_progress: Progress,
    ) -> None:
        self._run, self._ingests, self._on_progress = run, ingests, on_progress
        missing = sum(not ingest.open().ready for ingest in ingests.values())
        self._num_processes = min(num_processes, missing)
        self._children: list[Child] = []

    def __enter__(self) -> Self:
        for part in range(self._num_processes):
            self._start(part)
        return self

    def _start(self, part: int) -> None:
        place = (str(self._run.path), str(part), str(self._num_processes))
        child = Child(
            "tokenising",
            module_command(ingest_worker, *place),
            self._run.logs / f"ingest-{part}.log",
            environment=os.environ | {"TOKENIZERS_PARALLELISM": "true"},
            output="pipe",
        )
        self._children.append(child)
        threading.Thread(target=self._listen, args=(child,), daemon=True).start()

    def _listen(self, child: Child) -> None:
        for line in child.stdout:
            try:
                name, done, need = json.loads(line)
            except ValueError:  # what a library printed, or a line that a kill cut off
                continue
            self._on_progress(name, done, need)

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            child.request_stop()
        for child in self._children:
            child.join(GRACE_SECONDS)

    def check(self) -> None:
        """Raises what an ingest process failed with."""
        for child in self._children:
            if child.poll():
                raise child.error()

    def wait_until(self, enough: Callable[[Ingest], bool]) -> None:
        """Waits until enough of every source is there; raises what an ingest process failed with."""
        waiting = list(self._ingests.values())
        while waiting := [ingest for ingest in waiting if not enough(ingest)]:
            self.check()
            time.sleep(POLL_SECONDS)
        self.check()


def can_start(ingest: Ingest) -> bool:
    """Whether a source has its held-out text and a first shard to train on.

    One with max_epochs must be there as far as the run needs it: else nobody knows whether it will be exhausted.
    """
    source = ingest.open()
    if ingest.mixture.sources[ingest.name].max_epochs is not None:
        return source.ready
    return source.held_out_ready and source.num_shards > 0


def is_ready(ingest: Ingest) -> bool:
    return ingest.open().ready
