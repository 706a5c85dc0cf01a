"""What lm-evaluation-harness talks to: hands its requests on in chunks, and keeps every answer in a journal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from sparsify.evaluation.harness import Chunk, Journal
from sparsify.evaluation.model import Counts, together
from sparsify.evaluation.worker import Answering

CHUNK_REQUESTS = {"loglikelihood": 64, "loglikelihood_rolling": 2, "generate_until": 16}
"""Requests that are answered before the journal is written: what a killed evaluation loses at most of each process."""

Progress = Callable[[int, int], None]


class Asking(LM):
    """One task's requests on their way to the workers.

    Chunks are cut the same way for any number of workers, so that every batch, and so every answer, is the same too.

    Args:
        workers: Who answers.
        journal: Answers go to, or come from, files of this name with an ending.
        identity: Of the model.
        on_progress: Told of requests: done, all.
    """

    def __init__(
        self, workers: Answering, journal: Path, identity: str, on_progress: Progress
    ) -> None:
        super().__init__()
        self._workers, self._journal = workers, journal
        self._identity, self._on_progress = identity, on_progress
        self._chunks: list[Chunk] = []

    @property
    def counts(self) -> Counts:
        """What was counted for all answers, in earlier launches too."""
        return together(chunk.counts for chunk in self._chunks)

    @property
    def truncated_requests(self) -> int:
        """Requests whose beginning did not fit into the context."""
        return sum(chunk.truncated_requests for chunk in self._chunks)

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation, and whether it is the most likely one."""
        answers = self._answer("loglikelihood", requests)
        return [(float(log_likelihood), bool(greedy)) for log_likelihood, greedy in answers]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Log-likelihood of whole texts."""
        return self._answer("loglikelihood_rolling", requests)

    def generate_until(self, requests: Any) -> list[str]:
        """Continuations up to a stop."""
        return self._answer("generate_until", requests)

    def _answer(self, kind: str, requests: Any) -> list[Any]:
        asked = hashlib.blake2b(self._identity.encode(), digest_size=16)
        for request in requests:
            asked.update(repr(request.args).encode())
        path = self._journal.with_name(f"{self._journal.name}.{kind}.jsonl")
        journal = Journal(path, asked.hexdigest())
        answers = [answer for chunk in journal.chunks for answer in chunk.answers]
        given = [request.args for request in requests]
        size = CHUNK_REQUESTS[kind]
        rest = [given[at : at + size] for at in range(len(answers), len(given), size)]
        self._on_progress(len(answers), len(given))
        try:
            for chunk in self._workers.map("chunk", [(kind, some) for some in rest]):
                journal.add(chunk)
                answers += chunk.answers
                self._on_progress(len(answers), len(given))
        finally:
            journal.close()
        self._chunks += journal.chunks
        return answers
