"""Starts the ranks of a run on this machine and brings home how they ended.

Everything is resolved before the ranks start: they are handed a run folder and nothing else.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from sparsify.errors import RunError, StorageError
from sparsify.files import storage_errors
from sparsify.recipe import LaunchSection
from sparsify.training.processes import INTERRUPTED, USER_ERROR, log_tail, raise_user_error
from sparsify.training.run_folder import RunFolder

POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0
LEAST_FREE_BYTES = 64 * 1024


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""


def launch(run: RunFolder, settings: LaunchSection, check: Callable[[], None]) -> None:
    """Runs all ranks to the end. Rank 0 speaks on this terminal, the others into logs/.

    Args:
        run: The run's folder.
        settings: How many ranks.
        check: Called again and again; when it raises, the ranks save their state and end, and then it is raised.

    Raises:
        UserError: What a rank, or `check`, found wrong with what the user gave.
        Interrupted: If the run was interrupted, after its state was saved.
        RuntimeError: If a rank failed otherwise; the message is that rank's own.
    """
    environments = list(_rank_environments(settings))
    paths = [run.logs / f"rank-{rank}.log" for rank in range(len(environments))]
    with storage_errors(run.logs):
        run.logs.mkdir(parents=True, exist_ok=True)
        logs = [path.open("w") for path in paths]
    command = [sys.executable, "-m", "sparsify.training.worker", str(run.path)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment,
            stdout=None if rank == 0 else logs[rank],
            stderr=logs[rank] if rank == 0 else subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches them through us, once
        )
        for rank, environment in enumerate(environments)
    ]
    with _forward_signals(ranks) as forwarded:
        try:
            failed = _wait(ranks, check)
        except BaseException:
            _end(ranks)
            raise
    # A rank that was still starting has no handler yet and has changed nothing; one that was at its last step
    # ends well. Neither may hide that the user asked to stop.
    if forwarded and (failed is None or ranks[failed].returncode == -signal.SIGTERM):
        raise Interrupted
    if failed is not None:
        _raise_for(failed, ranks[failed].returncode, paths[failed])


def _rank_environments(settings: LaunchSection) -> Iterator[dict[str, str]]:
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    threads = settings.threads_per_process or max(1, cores // settings.processes)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    for rank in range(settings.processes):
        yield (
            os.environ
            | accelerator
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(settings.processes),
                "LOCAL_SIZE": str(settings.processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
            }
        )


@contextmanager
def _forward_signals(ranks: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Hands Ctrl-C and SIGTERM on to the ranks; yields the list of those that came."""
    forwarded: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGTERM)

    previous = {
        number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]], check: Callable[[], None]) -> int | None:
    """Waits for all ranks; when one fails the others are ended. Returns the index of the first that failed."""
    while True:
        check()
        codes = [rank.poll() for rank in ranks]
        failed = next((index for index, code in enumerate(codes) if code not in (None, 0)), None)
        if failed is not None:
            if codes[failed] != INTERRUPTED:
                time.sleep(POLL_SECONDS)
                _end(ranks)
            for rank in ranks:
                _wait_for(rank)
            # What the user can mend says more than what it led to in another rank.
            ended = [rank.returncode for rank in ranks]
            return ended.index(USER_ERROR) if USER_ERROR in ended else failed
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _end(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Asks all ranks to save and end, and waits for it."""
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        _wait_for(rank)


def _wait_for(rank: subprocess.Popen[bytes]) -> None:
    try:
        rank.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        rank.kill()
        rank.wait()


def _raise_for(rank: int, code: int, log: Path) -> None:
    if code == INTERRUPTED:
        raise Interrupted
    if code == USER_ERROR:
        raise_user_error(log)
    if code < 0:
        name = signal.Signals(-code).name
        raise RunError(
            f"Rank {rank} was killed by {name}.",
            next_step="SIGKILL often means that memory ran out: lower training.micro_batch_windows. "
            "The same command goes on from the last checkpoint."
            if name == "SIGKILL"
            else "The same command goes on from the last checkpoint.",
        )
    if shutil.disk_usage(log).free < LEAST_FREE_BYTES:
        # Metrics and the log itself stand on that disk, so the rank could not say so.
        raise StorageError(
            f"Rank {rank} failed while the disk of {log} was full.",
            next_step="Free space, then run the same command again: it goes on from the last checkpoint.",
        )
    raise RuntimeError(
        f"rank {rank} failed with exit code {code} (whole log: {log}):\n{log_tail(log)}"
    )
