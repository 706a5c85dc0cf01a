"""The queue between ranks: what goes through it comes back equal, and what a stranger puts there is not executed."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from sparsify.evaluation import rank_pool
from sparsify.evaluation.harness import Chunk
from sparsify.evaluation.metrics import Score
from sparsify.evaluation.rank_pool import RankQueue, run_on
from sparsify.evaluation.results import Sample
from sparsify.evaluation.subject import Counts
from sparsify.evaluation.worker_pool import EvalWorker, Method
from sparsify.launch.meeting import meeting_store
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.runs.manifest import gather_values

COUNTS = Counts([1, 2, 3, 4], [0, 0, 0, 0], 5, 0.1 + 0.2)


class Echo:
    """Computes nothing: what it was asked is what matters here."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        self.asked.append((kind, arguments))
        return Chunk([[-1 / 3, True], "text\u2028é"], COUNTS, 2)

    def sequence(self, sequence: PackedSequence) -> tuple[Score, Counts]:
        self.asked.append(sequence)
        return Score(1 / 7, 3.0), COUNTS

    def sample(self, prompt: str, num_tokens: int) -> Sample:
        self.asked.append((prompt, num_tokens))
        return Sample(prompt=prompt, text="and then")


def through_the_store(queue: RankQueue, echo: Echo, method: Method, item: tuple[Any, ...]) -> Any:
    queue.put("request", rank_pool._plain_request(method, item))
    queue.put("output", run_on(cast(EvalWorker, echo))(queue.take("request")))
    return rank_pool._output(method, queue.take("output"))


@pytest.mark.usefixtures("one_rank")
def test_requests_and_outputs_are_the_same_on_both_sides() -> None:
    queue, echo = RankQueue(lambda: False), Echo()
    arguments = [("context", " rest"), ("", {"until": ["\n"], "max_gen_toks": 3})]
    assert through_the_store(queue, echo, "chunk", ("loglikelihood", arguments)) == echo.chunk("", [])
    assert echo.asked[0] == ("loglikelihood", arguments)
    sequence = PackedSequence("web", np.arange(4), np.arange(4) % 2, np.array([1, -100, 3, -100]))
    echo.asked.clear()
    assert through_the_store(queue, echo, "sequence", (sequence,)) == (Score(1 / 7, 3.0), COUNTS)
    (asked,) = echo.asked
    assert asked.source == "web"
    for field in ("input_ids", "position_ids", "labels"):
        assert np.array_equal(getattr(asked, field), getattr(sequence, field))
        assert getattr(asked, field).dtype == np.int64
    assert through_the_store(queue, echo, "sample", ("Once", 7)) == Sample(prompt="Once", text="and then")
    assert gather_values({"a": "ü"}) == [{"a": "ü"}]


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("one_rank")
def test_a_strangers_value_is_not_executed(tmp_path: Path) -> None:
    queue = RankQueue(lambda: False)
    planted = pickle.dumps(Planted(tmp_path / "ran"))
    queue._store.set("request", planted)
    with pytest.raises(UnicodeDecodeError):
        queue.take("request")
    with pytest.raises(ValueError, match="not a request"):
        run_on(cast(EvalWorker, Echo()))(["__init__", "x"])
    queue._store.set("end", planted)
    with pytest.raises(UnicodeDecodeError):
        queue.serve()
    assert not (tmp_path / "ran").exists()


def test_the_store_listens_at_its_own_address_only() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = meeting_store("127.0.0.1", port, is_master=True, timeout=timedelta(seconds=10))
    store.set("key", "value")
    listening = [
        line.split()[1]
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        for line in Path(table).read_text().splitlines()[1:]
        if line.split()[3] == "0A" and line.split()[1].endswith(f":{port:04X}")
    ]
    assert listening == [f"0100007F:{port:04X}"]
    with socket.socket() as other:  # another address of this machine has nobody at that port
        assert other.connect_ex(("127.0.0.2", port)) != 0
