"""Tokenises for one run: `python -m sparsify.launch.ingest_worker RUN_DIR PART PARTS`.

Of the run's sources it takes every PARTS-th, beginning with PART, and serves first the one that is furthest behind, so that training
can begin soon and none of its sources runs short.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from filelock import Timeout

from sparsify.launch.child import StopRequest, run_child
from sparsify.mixture.tokens.ingest import Ingest, IngestSession
from sparsify.reporting.log_lines import error_console, print_log_lines
from sparsify.runs.data import ingests_of
from sparsify.runs.run_folder import RunFolder

TELL_SECONDS = 1.0
RETRY_SECONDS = 0.2


def main(run_dir: str, part: int, parts: int) -> bool:
    print_log_lines(to=error_console)  # standard output is for the launcher
    stop_requested = StopRequest()
    run = RunFolder(Path(run_dir))
    ingests = list(ingests_of(run.load_recipe(), run).values())[part::parts]
    return tokenize(ingests, stop_requested)


def tokenize(ingests: list[Ingest], stop_requested: StopRequest) -> bool:
    """Tokenises all of them in turns. Returns False when a stop was requested before the end."""
    waiting, told = list(ingests), 0.0
    with ExitStack() as stack:
        active: list[IngestSession] = []
        while waiting or active:
            if stop_requested():
                return False
            waiting = [ingest for ingest in waiting if not _begin(ingest, active, stack)]
            if not active:
                time.sleep(RETRY_SECONDS)  # other runs are tokenising what is left
                continue
            behind = min(active, key=lambda ingesting: ingesting.progress)
            if not behind.step():
                active.remove(behind)
                behind.close()
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                _tell(behind)
    return True


def _begin(ingest: Ingest, active: list[IngestSession], stack: ExitStack) -> bool:
    """Whether an ingest no longer waits: because it is done, or because it has begun."""
    if ingest.open().ready:
        return True
    try:
        active.append(stack.enter_context(IngestSession(ingest, wait=False)))
    except Timeout:
        return False
    return True


def _tell(ingesting: IngestSession) -> None:
    need = ingesting.task.need.train_tokens
    print(json.dumps([ingesting.task.name, ingesting.train_tokens, need]), flush=True)


if __name__ == "__main__":
    sys.exit(run_child(lambda: main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
