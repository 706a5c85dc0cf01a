"""Which node this is, where a DeepSpeed hostfile or torchrun says so instead of the command's own settings.

A hostfile starts the other nodes by ssh, with this command. Under torchrun every agent starts this command itself.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import RunError
from sparsify.launch.child import Child
from sparsify.launch.nodes import StartedNode, free_port
from sparsify.recipe.engine import TORCHRUN, LaunchSection
from sparsify.trust import without_secrets

EXPORTED = ("CUDA_", "HF_", "LD_LIBRARY_PATH", "NCCL_", "OMP_", "PYTHON", "UCX_", "WANDB_")
"""Environment variables that other nodes are given: those whose name begins so, but no secrets. The line with them can be
read in the list of processes of both machines, and only node 0 speaks with the Hub and the tracker."""
_HOST = re.compile(r"(?:\w[\w.-]*@)?[\w\[][\w.:\]-]*", re.ASCII)
GRACE_SECONDS = 20.0


@dataclass(frozen=True)
class NodePlacement:
    """Which of the nodes this process is.

    Attributes:
        overrides: What the recipe's `launch` is to be, in place of what the command said.
        started_nodes: The other nodes, where this process started them.
    """

    overrides: list[str]
    started_nodes: list[StartedNode]


@contextmanager
def placement(launch: LaunchSection, arguments: Sequence[str]) -> Iterator[NodePlacement]:
    """Finds this process's place, and keeps the other nodes of a hostfile running while the block runs.

    Raises:
        RunError: If the hostfile cannot be used, or torchrun did not start this process as it should.
    """
    if launch.rendezvous == TORCHRUN:
        yield NodePlacement(_torchrun(), [])
    elif launch.hostfile is not None:
        with ExitStack() as stack:
            yield _start_others(launch, arguments, stack)
    else:
        yield NodePlacement([], [])


def _torchrun() -> list[str]:
    try:
        nodes, rank, local = (int(os.environ[name]) for name in ("GROUP_WORLD_SIZE", "GROUP_RANK", "LOCAL_WORLD_SIZE"))
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    except KeyError as error:
        raise RunError(
            f"launch.rendezvous is {TORCHRUN}, but torchrun did not start this process: {error} is not set.",
            next_step="torchrun --nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT --no-python "
            "sparsify train …",
        ) from error
    if local != 1:
        raise RunError(
            f"torchrun starts {local} processes on each node.",
            allowed="One: sparsify starts the others, launch.processes of them.",
            next_step="Use --nproc-per-node=1.",
        )
    rendezvous = place if nodes > 1 else "null"
    return [f"launch.nodes={nodes}", f"launch.node_rank={rank}", f"launch.rendezvous={rendezvous}"]


def read_hostfile(path: str) -> dict[str, int]:
    """Hosts and how many processes each is to run, in DeepSpeed's format: `HOST slots=N` a line.

    Raises:
        RunError: If it is not there, not in that format, or its hosts differ in their slots.
    """
    if not Path(path).is_file():
        raise RunError(f"launch.hostfile={path} is not there.", next_step="Lines of: HOST slots=N")
    from deepspeed.launcher.runner import fetch_hostfile

    try:
        hosts: dict[str, int] = fetch_hostfile(path) or {}
    except ValueError as error:
        raise RunError(f"{path}: {error}.", allowed="Lines of: HOST slots=N") from error
    strange = [host for host in hosts if not _HOST.fullmatch(host)]
    if strange:
        raise RunError(
            f"{path}: {strange[0]!r} is not the name of a host.",
            allowed="[USER@]HOST of letters, digits, dots, colons, underscores and hyphens; neither begins with a hyphen, "
            "which ssh would take for an option.",
            next_step="Correct that line, and ask who wrote the file.",
        )
    if not hosts:
        raise RunError(f"{path} names no host.", allowed="Lines of: HOST slots=N")
    if len(set(hosts.values())) > 1:
        said = ", ".join(f"{host} {slots}" for host, slots in hosts.items())
        raise RunError(
            f"The hosts of {path} differ in their slots: {said}.",
            allowed="The same number on each: ranks share every batch evenly.",
        )
    return hosts


def _start_others(launch: LaunchSection, arguments: Sequence[str], stack: ExitStack) -> NodePlacement:
    assert launch.hostfile is not None
    hosts = read_hostfile(launch.hostfile)
    slots = next(iter(hosts.values()))
    if launch.processes not in (1, slots):
        raise RunError(
            f"launch.processes is {launch.processes}, but {launch.hostfile} says slots={slots}.",
            next_step="Remove launch.processes, or correct the file.",
        )
    if len(hosts) > 1 and shutil.which("ssh") is None:
        raise RunError("launch.hostfile needs ssh, which is not installed here.")
    first, *others = hosts
    rendezvous = f"{first}:{free_port()}" if others else "null"
    common = [
        "launch.hostfile=null",
        f"launch.nodes={len(hosts)}",
        f"launch.processes={slots}",
        f"launch.rendezvous={rendezvous}",
    ]
    started_nodes = []
    logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    for rank, host in enumerate(others, 1):
        command = _command([*arguments, *common, f"launch.node_rank={rank}"])
        child = Child(
            f"Node {rank} ({host})",
            ["ssh", "-o", "BatchMode=yes", "--", host, command],
            logs / f"node-{rank}.log",
        )
        stack.callback(child.join, GRACE_SECONDS)  # by now node 0 has ended the others, or is gone
        started_nodes.append(StartedNode(child.name, child.poll, child.log_tail))
    return NodePlacement([*common, "launch.node_rank=0"], started_nodes)


def _command(arguments: Sequence[str]) -> str:
    """A line for a shell elsewhere: the same folder, the same Python, what of the environment matters."""
    known = sorted(without_secrets(os.environ).items())
    exported = [f"{name}={shlex.quote(value)}" for name, value in known if name.startswith(EXPORTED)]
    own = sys.orig_argv[1 : len(sys.orig_argv) - len(sys.argv[1:])]  # how this program was started
    program = shlex.join([sys.executable, *own, *arguments])
    return f"cd {shlex.quote(str(Path.cwd()))} && exec env {' '.join(exported)} {program}"
