"""Starts the ranks of a run on this machine and raises what they failed with.

Everything is resolved before the ranks start: they get nothing but a run folder. With several machines each has a
launcher; what fails on one of them ends the ranks of all.

Why not `torch.distributed.launcher.elastic_launch` (measured with torch 2.13, two gloo processes): after SIGTERM its agent kills the
workers 30 s later, a fixed time, in the middle of a save of 45 s, while a large model may need `SAVE_SECONDS`; it takes exit code 130
of a rank that has saved for a failure and ends the other ranks at once; and after SIGTERM it raises `SignalException` whether the
ranks have saved or not. Only the order of errors, the first one first, is as it is here.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

from sparsify.errors import RunError, StorageError, UserError
from sparsify.launch.child import INTERRUPTED, USER_ERROR, Child, Interrupted, killed, module_command
from sparsify.launch.nodes import LaunchOrder, Nodes
from sparsify.recipe.engine import LaunchSection
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import POLL_SECONDS, RunFolder
from sparsify.runs.run_lock import RunLock

SETTLE_SECONDS = 1.0
"""After a rank failed, the others are given this long to say what they met before they are ended."""
SAVE_SECONDS = 600.0
"""How long ranks may take to save after SIGTERM."""
LEAST_FREE_BYTES = 64 * 1024
CONTINUES = "The same command continues from the last checkpoint."


@dataclass(frozen=True)
class Failure:
    """How one rank failed.

    Attributes:
        rank: Its number over all nodes.
        code: Its exit code; below 0 the signal that killed it.
        time: When, in seconds since the epoch.
        error: `UserError.to_json` of the error that the command ends with; for a defect only its `message`.
    """

    rank: int
    code: int
    time: float
    error: dict[str, str]

    def exception(self) -> Exception:
        if "class" in self.error:
            return UserError.from_json(self.error)
        return RuntimeError(self.error["message"])


def launch(run: RunFolder, worker: ModuleType, nodes: Nodes, check: Callable[[], None], lock: RunLock) -> None:
    """Node 0: runs all ranks to the end; rank 0 prints to this terminal, the others into logs/. When `check` raises,
    the ranks save their state and end, and then it is raised. A rank's UserError is raised here, Interrupted after a
    clean save, RuntimeError for a defect. The ranks hold `lock` too: if this process is killed, nobody else can begin
    to write into the run before the last of them is gone.
    """
    run_ranks(run, worker, nodes, nodes.announce(run.path), check, [lock.descriptor])


def serve(worker: ModuleType, nodes: Nodes) -> None:
    """Other nodes: runs this machine's ranks of whatever node 0 starts, until there is no more.

    Raises:
        UserError: As `launch`, also for what failed on another node.
        Interrupted: If the run was interrupted.
    """
    for order in nodes.orders():
        run_ranks(RunFolder(Path(order.run)), worker, nodes, order, lambda: None)


def run_ranks(
    run: RunFolder,
    worker: ModuleType,
    nodes: Nodes,
    order: LaunchOrder,
    check: Callable[[], None],
    kept_open: Sequence[int] = (),
) -> None:
    """Runs this machine's ranks to the end. Raises as `launch`."""
    ranks: list[Child] = []
    first = nodes.settings.node_rank * nodes.settings.processes
    for rank, environment in enumerate(_rank_environments(nodes.settings, order), first):
        ranks.append(
            Child(
                f"rank {rank}",
                module_command(worker, str(run.path)),
                run.logs / f"rank-{rank}.log",
                environment=environment,
                kept_open=kept_open,
                output="log" if rank else "terminal",
            )
        )
    with _forward_signals(ranks) as forwarded:
        try:
            codes, elsewhere = _wait(ranks, lambda: nodes.failures(order), check)
        except BaseException:
            _save_and_end(ranks)
            raise
    mine = [
        _failure(run, number, code, rank)
        for number, (code, rank) in enumerate(zip(codes, ranks, strict=True), first)
        # A rank that was still starting has no handler yet and has changed nothing.
        if code not in (None, 0, INTERRUPTED) and not (forwarded and code == -signal.SIGTERM)
    ]
    nodes.report(order, [asdict(failure) for failure in mine])
    failures = [
        *mine,
        *(Failure(**failure) for failure in elsewhere or _reported_elsewhere(nodes, order, mine)),
    ]
    if failures:
        raise min(failures, key=_precedence).exception()
    # One that was at its last step ends well; that may not hide that the user wanted to stop.
    if forwarded or INTERRUPTED in codes:
        raise Interrupted


def _reported_elsewhere(nodes: Nodes, order: LaunchOrder, mine: list[Failure]) -> list[dict[str, Any]]:
    """What other nodes report at the same time: what fails here may only follow from it."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while mine and nodes.settings.nodes > 1 and time.monotonic() < deadline:
        if reported := nodes.failures(order):
            return reported
        time.sleep(POLL_SECONDS)
    return []


def _precedence(failure: Failure) -> tuple[int, float]:
    """What the user can fix or the system did comes before what it led to in other ranks; then what came first."""
    cause = 0 if failure.code == USER_ERROR else 1 if failure.code < 0 else 2
    return cause, failure.time


def _rank_environments(settings: LaunchSection, order: LaunchOrder) -> Iterator[dict[str, str]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = settings.threads_per_process or max(1, cores // settings.processes)
    accelerator = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    # torchrun's own variables would send the ranks to its store, and not to where they meet.
    inherited = {key: value for key, value in os.environ.items() if "TORCHELASTIC" not in key}
    for local_rank in range(settings.processes):
        yield (
            inherited
            | accelerator
            | {
                "RANK": str(settings.node_rank * settings.processes + local_rank),
                "LOCAL_RANK": str(local_rank),
                "WORLD_SIZE": str(settings.total_processes),
                "LOCAL_SIZE": str(settings.processes),
                "MASTER_ADDR": order.address,
                "MASTER_PORT": str(order.port),
                "OMP_NUM_THREADS": str(threads),
                "TOKENIZERS_PARALLELISM": "false",
            }
        )


@contextmanager
def _forward_signals(ranks: list[Child]) -> Iterator[list[int]]:
    """Hands Ctrl-C and SIGTERM on to the ranks; yields the list of those that came."""
    forwarded: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        forwarded.append(number)
        for rank in ranks:
            if rank.poll() is None:
                rank.request_stop()

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield forwarded
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(
    ranks: list[Child],
    elsewhere: Callable[[], list[dict[str, Any]]],
    check: Callable[[], None],
) -> tuple[list[int | None], list[dict[str, Any]]]:
    """Waits for all ranks; when one fails, here or elsewhere, the others are ended.

    Returns:
        Exit codes, None for ranks that were ended from here; and what failed elsewhere.
    """
    while True:
        check()
        codes = [rank.poll() for rank in ranks]
        reported = elsewhere()
        if reported or any(code not in (None, 0, INTERRUPTED) for code in codes):
            time.sleep(SETTLE_SECONDS)
            codes = [rank.poll() for rank in ranks]
            for rank in ranks:  # without the one that failed they can neither continue nor save
                rank.kill()
            return codes, reported
        if INTERRUPTED in codes:
            _save_and_end(ranks)
            return [rank.poll() for rank in ranks], []
        if all(code == 0 for code in codes):
            return codes, []
        time.sleep(POLL_SECONDS)


def _save_and_end(ranks: list[Child]) -> None:
    """Asks all ranks to save and end, and waits for it."""
    deadline = time.monotonic() + SAVE_SECONDS
    for rank in ranks:
        rank.request_stop()
    while any(rank.poll() is None for rank in ranks):
        lost = any(rank.poll() not in (None, 0, INTERRUPTED) for rank in ranks)
        if lost or time.monotonic() > deadline:
            time.sleep(SETTLE_SECONDS)
            for rank in ranks:
                rank.kill()
        time.sleep(POLL_SECONDS)


def _failure(run: RunFolder, number: int, code: int | None, rank: Child) -> Failure:
    assert code is not None
    error = _error(run, code, rank)
    record = error.to_json() if isinstance(error, UserError) else {"message": str(error)}
    return Failure(number, code, rank.failure_time(), record)


def _error(run: RunFolder, code: int, rank: Child) -> Exception:
    if code == USER_ERROR:
        return rank.error()
    where = f"after step {_last_step(run)}"
    if code < 0:
        return RunError(
            killed(rank.name, code, where).given,
            next_step=f"SIGKILL often means that memory ran out: lower training.micro_batch_size. {CONTINUES}"
            if code == -signal.SIGKILL
            else f"{CONTINUES} Its log is {rank.log}.",
        )
    if shutil.disk_usage(rank.log).free < LEAST_FREE_BYTES:
        # Metrics and the log itself stand on that disk, so the rank could not say so.
        return StorageError(
            f"{rank.name.capitalize()} failed {where} while the disk of {rank.log} was full.",
            next_step="Free space, then run the same command again: it continues from the last checkpoint.",
        )
    return RuntimeError(f"{rank.error(where)}\n{CONTINUES}")


def _last_step(run: RunFolder) -> int:
    try:
        return max((record.get("step", 0) for record in read_lines(run.metrics)), default=0)
    except (OSError, UserError):
        return 0
