"""lm-evaluation-harness's view of a model: runs requests in chunks on a pool of workers, and journals every output."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from sparsify.evaluation.harness import Chunk
from sparsify.evaluation.subject import Counts, sum_counts
from sparsify.evaluation.worker_pool import WorkerPool
from sparsify.files import write_text
from sparsify.metadata import parse_json

CHUNK_BATCHES = {"loglikelihood": 8, "generate_until": 2}
CHUNK_TEXTS = 2
"""Batches, or whole texts, per journal entry; a killed evaluation loses at most this many for each process."""

Progress = Callable[[int, int], None]


class Journal:
    """Append-only file of finished chunks. A truncated last line is discarded.

    Args:
        identity: Hash of model and requests. A file with a different identity is overwritten.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.chunks: list[Chunk] = []
        head = json.dumps({"identity": identity}) + "\n"
        valid_bytes = 0
        if path.is_file():
            with path.open("rb") as file:
                if file.readline() == head.encode():
                    valid_bytes = file.tell()
                    for line in file:
                        chunk = _chunk(line)
                        if chunk is None:
                            break
                        self.chunks.append(chunk)
                        valid_bytes += len(line)
        if not valid_bytes:
            write_text(path, head)
            valid_bytes = len(head)
        self._file = path.open("ab")
        self._file.truncate(valid_bytes)

    def add(self, chunk: Chunk) -> None:
        """Appends a chunk and flushes it to disk."""
        self.chunks.append(chunk)
        self._file.write((json.dumps(list(chunk)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _chunk(line: bytes) -> Chunk | None:
    try:
        if not line.endswith(b"\n"):
            return None
        outputs, counts, truncated_requests = parse_json(line)
        return Chunk(outputs, Counts(*counts), truncated_requests)
    except (ValueError, TypeError):
        return None


class JournaledLM(LM):
    """Runs one task's requests on a pool of workers.

    The chunks do not depend on the number of workers, so that every batch, and with it every output, is the same. They hold
    whole batches, except for the last one.

    Args:
        journal: Path of the journal, to which the kind of request and a suffix are added.
        identity: Hash of the model.
    """

    def __init__(
        self, workers: WorkerPool, journal: Path, identity: str, batch_size: int, on_progress: Progress
    ) -> None:
        super().__init__()
        self._workers, self._journal, self._batch_size = workers, journal, batch_size
        self._identity, self._on_progress = identity, on_progress
        self._chunks: list[Chunk] = []

    @property
    def counts(self) -> Counts:
        return sum_counts(chunk.counts for chunk in self._chunks)

    @property
    def truncated_requests(self) -> int:
        """Requests longer than the context, whose beginning was cut off."""
        return sum(chunk.truncated_requests for chunk in self._chunks)

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the most likely one."""
        outputs = self._run("loglikelihood", requests)
        return [(float(log_likelihood), bool(greedy)) for log_likelihood, greedy in outputs]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Log-likelihood of whole texts."""
        return self._run("loglikelihood_rolling", requests)

    def generate_until(self, requests: Any) -> list[str]:
        """Continuations up to a stop string."""
        return self._run("generate_until", requests)

    def _run(self, kind: str, requests: Any) -> list[Any]:
        identity = hashlib.blake2b(self._identity.encode(), digest_size=16)
        for request in requests:
            identity.update(repr(request.args).encode())
        path = self._journal.with_name(f"{self._journal.name}.{kind}.jsonl")
        journal = Journal(path, identity.hexdigest())
        outputs = [output for chunk in journal.chunks for output in chunk.outputs]
        arguments = [request.args for request in requests]
        size = CHUNK_BATCHES[kind] * self._batch_size if kind in CHUNK_BATCHES else CHUNK_TEXTS
        rest = [arguments[at : at + size] for at in range(len(outputs), len(arguments), size)]
        self._on_progress(len(outputs), len(arguments))
        try:
            for chunk in self._workers.map("chunk", [(kind, some) for some in rest]):
                journal.add(chunk)
                outputs += chunk.outputs
                self._on_progress(len(outputs), len(arguments))
        finally:
            journal.close()
        self._chunks += journal.chunks
        return outputs
