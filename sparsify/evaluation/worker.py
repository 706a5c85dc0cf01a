"""Who answers: this process alone, or several with a model each.

Several are processes that this one hands work to as each becomes free, and takes the answers from in order. On the CPU they
read one copy of the weights in shared memory; where there are GPUs each has its own on the next GPU. lm-evaluation-harness's own
ranks are not used: they fill their shares up with requests that are asked twice, which would count in zeros and tokens.

The model of one process, and everything that it can be asked.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal, Protocol, Self, cast

import torch
import torch.multiprocessing  # teaches pickle to share tensors instead of copying them
from transformers import PreTrainedTokenizerFast

from sparsify.errors import EvaluationError
from sparsify.evaluation.harness import Chunk, MeasuredModel
from sparsify.evaluation.model import Counter, Counts
from sparsify.evaluation.results import Sample
from sparsify.evaluation.scores import Score
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.models import SparseModel
from sparsify.predictors import Predictors
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss

REPETITION_PENALTY = 1.1
"""Of samples; that of the ones that an export's check writes."""


class Measurer:
    """Context manager around a model that answers.

    Args:
        model: A sparse model in evaluation mode.
        tokenizer: Its tokenizer.
        batch_size: Requests of one forward pass.
        predictors: Of the model; every pass is then masked by them.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        predictors: Predictors | None = None,
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._counter = Counter(model, predictors)
        self._harness = MeasuredModel(model, tokenizer, self._counter, batch_size)

    def __enter__(self) -> Self:
        self._counter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._counter.__exit__()

    @torch.no_grad()
    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        """Answers requests of lm-evaluation-harness."""
        return self._harness.chunk(kind, arguments)

    @torch.no_grad()
    def sequence(self, sequence: PackedSequence) -> tuple[Score, Counts]:
        """Negative log-likelihood of a sequence of text, and its number of labels."""
        batch = {key: value.to(self._model.device) for key, value in collate([sequence]).items()}
        self._counter.begin()
        loss = float(summed_loss(self._model, batch))
        labels = float((batch["labels"] != IGNORED_LABEL).sum())
        return Score(loss, labels), self._counter.taken()

    @torch.no_grad()
    def sample(self, prompt: str, num_tokens: int) -> Sample:
        """Goes on from a prompt greedily, with a mild penalty on repeating itself: the same weights give the same text."""
        inputs = self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = {key: value.to(self._model.device) for key, value in inputs.items()}
        output = cast(Any, self._model).generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        written = output[0, inputs["input_ids"].shape[1] :].tolist()
        return Sample(
            prompt=prompt, text=str(self._tokenizer.decode(written, skip_special_tokens=True))
        )


Method = Literal["chunk", "sequence", "sample"]
SHARED_MEMORY = Path("/dev/shm")


class Answering(Protocol):
    """Who answers, while its context lasts."""

    device: str
    """Type of what answers."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, error: object, trace: object, /) -> None: ...

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What a method of Measurer returns for the arguments of each item, in their order."""
        ...


class Workers:
    """Context manager that maps methods of a Measurer over items.

    Args:
        model: A sparse model in evaluation mode; on the CPU if there are several processes.
        tokenizer: Its tokenizer.
        batch_size: Requests of one forward pass.
        predictors: Of the model; every pass is then masked by them.
        processes: How many answer.

    Raises:
        EvaluationError: If shared memory cannot hold the model.
    """

    def __init__(
        self,
        model: SparseModel,
        tokenizer: PreTrainedTokenizerFast,
        batch_size: int,
        predictors: Predictors | None = None,
        processes: int = 1,
    ) -> None:
        self._own: Measurer | None = None
        self._pool: ProcessPoolExecutor | None = None
        self.device = "cuda" if processes > 1 and torch.cuda.is_available() else model.device.type
        """Type of what answers."""
        if processes == 1:
            self._own = Measurer(model, tokenizer, batch_size, predictors)
            return
        _make_room(model)
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for place in range(processes):
            count = torch.cuda.device_count()
            devices.put(f"cuda:{place % count}" if count else "cpu")
        threads = max(1, torch.get_num_threads() // processes)
        # Not an Event: telling one waits for all who listen, those that were killed too.
        self._told, self._tell = context.Pipe(duplex=False)
        given = (model, tokenizer, batch_size, predictors)
        self._pool = ProcessPoolExecutor(
            processes, context, _begin, (self._told, devices, threads, given)
        )

    def __enter__(self) -> Self:
        if self._own is not None:
            self._own.__enter__()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if self._own is not None:
            self._own.__exit__()
        if self._pool is not None:
            if kind is not None:
                self._tell.send_bytes(b"end")  # what is under way would be thrown away
            self._pool.shutdown(cancel_futures=True)

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """What a method of Measurer returns for the arguments of each item, in their order.

        Raises:
            EvaluationError: If a worker was killed.
        """
        if self._own is not None:
            yield from (getattr(self._own, method)(*item) for item in items)
            return
        assert self._pool is not None
        try:
            yield from self._pool.map(_call, [method] * len(items), items)
        except BrokenProcessPool as error:
            raise EvaluationError(
                "A process of the evaluation ended before its work was done, perhaps for lack of memory.",
                next_step="Give the same command with fewer --processes or a smaller --batch-size; it goes on where it "
                "stopped.",
            ) from error


_measurer: Measurer | None = None
"""That of a worker."""


def _begin(told: Connection, devices: Queue[str], threads: int, given: tuple[Any, ...]) -> None:
    """What a worker does first."""
    global _measurer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    threading.Thread(target=_watch, args=(told,), daemon=True).start()
    torch.set_num_threads(threads)
    model, tokenizer, batch_size, predictors = given
    device = devices.get()
    if device != "cpu":
        torch.nn.Module.to(model, device)
    _measurer = Measurer(model, tokenizer, batch_size, predictors).__enter__()


def _watch(told: Connection) -> None:
    """Ends a worker when it is told to, and when nobody is left to tell it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([told, parent.sentinel])
    os._exit(1)


def _call(method: Method, item: tuple[Any, ...]) -> Any:
    assert _measurer is not None
    return getattr(_measurer, method)(*item)


def _make_room(model: SparseModel) -> None:
    """Sees to it that every tensor can be shared: a file descriptor each, in memory that containers keep small."""
    tensors = list(model.state_dict().values())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else size
    if size > free:
        raise EvaluationError(
            f"Several processes share one copy of the model, {size / 1e9:.2f} GB, and {SHARED_MEMORY} has room for "
            f"{free / 1e9:.2f} GB.",
            next_step="Give the container more of it (docker run --shm-size), or leave --processes out.",
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = min(hard, soft + 2 * len(tensors)) if hard != resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
