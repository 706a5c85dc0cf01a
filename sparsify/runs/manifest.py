"""Writes the manifest of a checkpoint that several ranks write."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sparsify.conversion.manifest import FileEntry, record_files
from sparsify.files import sync_folder

_OWN_SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_")


def write_manifest(folder: Path) -> int:
    """Brings a checkpoint's files onto the disk and records them; every rank calls it, once all of them are written.

    Each rank reads back what it wrote itself, while that is still in its machine's memory.

    Returns:
        Bytes of all files.

    Raises:
        OSError: If the disk refuses.
    """
    rank = dist.get_rank()
    mine = [path for path in sorted(folder.iterdir()) if _writer(path.name) == rank]
    entries = {path.name: _record(path) for path in mine}
    gathered = gather_values({name: asdict(entry) for name, entry in entries.items()})
    files = {name: FileEntry(**entry) for part in gathered for name, entry in sorted(part.items())}
    if rank == 0:
        record_files(folder, files)
        sync_folder(folder)
    return sum(entry.size_bytes for entry in files.values())


def gather_values(value: Any) -> list[Any]:
    """A JSON value of every rank, in their order; every rank calls it. torch's own way unpickles what it receives."""
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    text = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)], device=device))
    padded = torch.zeros(max(int(size) for size in sizes), dtype=torch.uint8, device=device)
    padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    texts = [torch.zeros_like(padded) for _ in sizes]
    dist.all_gather(texts, padded)
    return [json.loads(one[: int(size)].cpu().numpy().tobytes()) for one, size in zip(texts, sizes, strict=True)]


def _writer(name: str) -> int:
    """The rank that DeepSpeed lets write a file: its number is in the name of a shard, all else is rank 0's."""
    own = _OWN_SHARD.search(name)
    return int(own[1]) if own else 0


def _record(path: Path) -> FileEntry:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return FileEntry.of(path)
