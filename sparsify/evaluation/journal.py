"""The journal of a task that is being measured: what the model answered so far, so that nothing is asked twice."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from sparsify.evaluation.counting import Counts
from sparsify.files import write_text


class Chunk(NamedTuple):
    """Some requests, their answers, and what was counted while they were answered."""

    answers: list[Any]
    counts: Counts
    truncated_requests: int
    """Requests whose beginning did not fit into the context."""


class Journal:
    """Appends chunks to a file; a torn last line is read anew.

    Args:
        path: The file.
        identity: Of model and requests. A file of another identity is begun anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.chunks: list[Chunk] = []
        head = json.dumps({"identity": identity}) + "\n"
        kept = 0
        if path.is_file():
            with path.open("rb") as file:
                if file.readline() == head.encode():
                    kept = file.tell()
                    for line in file:
                        chunk = _chunk(line)
                        if chunk is None:
                            break
                        self.chunks.append(chunk)
                        kept += len(line)
        if not kept:
            write_text(path, head)
            kept = len(head)
        self._file = path.open("ab")
        self._file.truncate(kept)

    def add(self, chunk: Chunk) -> None:
        """Puts a chunk on the disk."""
        self.chunks.append(chunk)
        self._file.write((json.dumps(list(chunk)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()


def _chunk(line: bytes) -> Chunk | None:
    try:
        if not line.endswith(b"\n"):
            return None
        answers, counts, truncated_requests = json.loads(line)
        return Chunk(answers, Counts(*counts), truncated_requests)
    except (ValueError, TypeError):
        return None
