"""Several machines, one run: node 0 decides everything and tells the others which run to start and when to end.

Nodes meet at `launch.rendezvous`, a TCP store that node 0 serves. What they read and write, the run folder, lies on storage that
all of them see.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sparsify.errors import RunError
from sparsify.launch.meeting import meeting_store
from sparsify.recipe.engine import LaunchSection
from sparsify.runs.run_folder import POLL_SECONDS

MEET_SECONDS = 1800.0
"""How long nodes wait for each other at the beginning: a scheduler may start them minutes apart."""
FAREWELL_SECONDS = 10.0


@dataclass(frozen=True)
class LaunchOrder:
    """What node 0 tells the others to start.

    Attributes:
        run: Absolute path of the run folder; empty when there is nothing more to do.
        address: Where the ranks' own process group meets.
        port: Its port.
        launch: Number of the launch; a run and its baseline are two.
        nodes: Nodes that node 0 counts on.
        processes: Ranks that it counts on at each.
    """

    run: str
    address: str
    port: int
    launch: int
    nodes: int
    processes: int


@dataclass(frozen=True)
class StartedNode:
    """Another node that this one started.

    Attributes:
        poll: Its exit code; None while it runs.
        output_tail: What it printed at the end.
    """

    name: str
    poll: Callable[[], int | None]
    output_tail: Callable[[], str]


class Nodes:
    """This node's end of the rendezvous; on a single machine there is nobody to talk to."""

    def __init__(self, settings: LaunchSection, started_nodes: Sequence[StartedNode] = ()) -> None:
        self.settings, self._started_nodes, self._launch = settings, started_nodes, 0
        self._store: Any = None
        if settings.nodes > 1:
            self._store = _meet(settings)

    def announce(self, run: Path) -> LaunchOrder:
        """Node 0: has all nodes start the ranks of a run."""
        settings = self.settings
        address = "127.0.0.1" if settings.rendezvous is None else _host(settings)[0]
        order = LaunchOrder(
            str(run.absolute()),
            address,
            free_port(),
            self._launch,
            settings.nodes,
            settings.processes,
        )
        self._set(f"launch/{self._launch}", asdict(order))
        self._launch += 1
        return order

    def orders(self) -> Iterator[LaunchOrder]:
        """Other nodes: the runs that node 0 starts, one after another, until it says that there are no more.

        Raises:
            RunError: If node 0 is gone, or counts on other numbers than this node was given.
        """
        while True:
            while not self.has(f"launch/{self._launch}"):
                time.sleep(POLL_SECONDS)
            order = LaunchOrder(**self._get(f"launch/{self._launch}"))
            self._launch += 1
            if not order.run:
                return
            mine = (self.settings.nodes, self.settings.processes)
            if mine != (order.nodes, order.processes):
                raise self._error(
                    f"was given launch.nodes={mine[0]} launch.processes={mine[1]}, but node 0 has {order.nodes} and "
                    f"{order.processes}.",
                    "Give every node the same command; only launch.node_rank differs.",
                )
            if not Path(order.run).is_dir():
                raise self._error(
                    f"does not see {order.run}, the run folder of node 0.",
                    "Set run_dir and cache_dir to folders on storage that all nodes share.",
                )
            yield order

    def report(self, order: LaunchOrder, failures: list[dict[str, Any]]) -> None:
        if failures:
            self._set(f"failed/{order.launch}/{self.settings.node_rank}", failures)
            self._set(f"failed/{order.launch}", True)

    def failures(self, order: LaunchOrder) -> list[dict[str, Any]]:
        """What other nodes reported.

        Raises:
            RunError: If node 0 is gone, or a node that this one started ended without a word.
        """
        gone = [one for one in self._started_nodes if one.poll() not in (None, 0)]  # before the store is queried
        # One question as long as all goes well: every launcher asks it several times a second.
        if self._store is None or not self.has(f"failed/{order.launch}"):
            if gone:
                raise RunError(
                    f"{gone[0].name} ended with exit code {gone[0].poll()}: {gone[0].output_tail()}",
                    next_step="The same command continues from the last checkpoint.",
                )
            return []
        others = (node for node in range(self.settings.nodes) if node != self.settings.node_rank)
        keys = [f"failed/{order.launch}/{node}" for node in others]
        return [failure for key in keys if self.has(key) for failure in self._get(key)]

    def close(self) -> None:
        """Node 0 ends the other nodes and waits for their acknowledgement; another node acknowledges."""
        if self._store is None:
            return
        if self.settings.node_rank > 0:
            with suppress(RunError):  # node 0 may be the one that failed
                self._set(f"left/{self.settings.node_rank}", True)
            return
        self._set(f"launch/{self._launch}", asdict(LaunchOrder("", "", 0, self._launch, 0, 0)))
        deadline = time.monotonic() + FAREWELL_SECONDS
        others = [f"left/{node}" for node in range(1, self.settings.nodes)]
        while not all(map(self.has, others)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def has(self, key: str) -> bool:
        return self._query(lambda store: store.check([key]))

    def _get(self, key: str) -> Any:
        return json.loads(self._query(lambda store: store.get(key)))

    def _set(self, key: str, value: Any) -> None:
        if self._store is not None:
            self._query(lambda store: store.set(key, json.dumps(value)))

    def _query(self, request: Callable[[Any], Any]) -> Any:
        try:
            return request(self._store)
        except RuntimeError as error:
            raise self._error(
                f"lost node 0 at {self.settings.rendezvous}: {str(error).partition(chr(10))[0]}",
                "What node 0 says is the cause. The same command on every node continues from the last checkpoint.",
            ) from error

    def _error(self, what: str, next_step: str) -> RunError:
        return RunError(f"Node {self.settings.node_rank} {what}", next_step=next_step)


@contextmanager
def rendezvous_of(settings: LaunchSection, started_nodes: Sequence[StartedNode] = ()) -> Iterator[Nodes]:
    nodes = Nodes(settings, started_nodes)
    try:
        yield nodes
    finally:
        nodes.close()


def _meet(settings: LaunchSection) -> Any:
    host, port = _host(settings)
    # torchrun may serve that port itself, for whatever it starts.
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and (
        settings.rendezvous == f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    )
    try:
        is_master = settings.node_rank == 0 and not is_served
        store = meeting_store(host, port, is_master=is_master, timeout=timedelta(seconds=MEET_SECONDS))
    except (RuntimeError, OSError) as error:
        role = "serve" if settings.node_rank == 0 else "reach"
        raise RunError(
            f"Node {settings.node_rank} cannot {role} launch.rendezvous={settings.rendezvous}: "
            f"{str(error).partition(chr(10))[0]}",
            next_step="Name the host of node 0, as the other nodes know it, and a free port that no firewall closes.",
        ) from error
    # Agents that restart everything keep their store, and with it what was said before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sparsify/{attempt}", store)  # pyright: ignore[reportPrivateImportUsage]


def _host(settings: LaunchSection) -> tuple[str, int]:
    host, _, port = (settings.rendezvous or "").rpartition(":")
    return host, int(port)


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
