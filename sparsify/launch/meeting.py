"""The key-value store through which processes of a run meet, listening at the run's own address only.

torch's store listens at every address of the machine and has no password. Nothing read from it may be executed: values are
JSON.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

LOCAL_NAMES = ("localhost", "ip6-localhost")


def meeting_store(host: str, port: int, *, is_master: bool, timeout: timedelta) -> Any:
    """The store at `host`; the master serves it.

    Raises:
        RuntimeError: If it cannot be reached.
        OSError: If the address is not one of this machine, or its port is taken.
    """
    arguments: dict[str, Any] = {"is_master": is_master, "wait_for_workers": False, "timeout": timeout}
    if is_master:
        listener = _listener(host, port)
        arguments["master_listen_fd"] = listener.detach()
    return dist.TCPStore(host, port, **arguments)  # pyright: ignore[reportPrivateImportUsage]


def _listener(host: str, port: int) -> socket.socket:
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    address = str(place[0])
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback and not _is_local(host):
        # Many systems give their own host name a loopback address, at which no other machine reaches them.
        family, address = socket.AF_INET, ""
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2048)
    except BaseException:
        listener.close()
        raise
    return listener


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in LOCAL_NAMES


def meet_ranks(backend: str, timeout: timedelta) -> None:
    """Joins the process group of the ranks, whose place is in the environment."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _is_local(host) and Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = meeting_store(host, port, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
