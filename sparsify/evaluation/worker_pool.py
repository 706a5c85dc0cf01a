"""The model of one process and what can be computed with it (`EvalWorker`), and a pool of such processes (`ProcessPool`).

The pool gives work to each process as it becomes free and returns the outputs in order. On the CPU all processes read one
copy of the weights in shared memory; on GPUs each process has its own copy, on GPUs in turn. The data parallelism of
lm-evaluation-harness is not used: it pads its shares with repeated requests, which would distort zeros and token counts.
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
from sparsify.evaluation.harness import Chunk, CountingHFLM
from sparsify.evaluation.metrics import Score
from sparsify.evaluation.results import Sample
from sparsify.evaluation.subject import Counter, Counts
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.models import SparseModel
from sparsify.predictors import Predictors
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss

REPETITION_PENALTY = 1.1
"""Repetition penalty of samples; the same as in the verification of an export."""


class EvalWorker:
    """Context manager around a model that runs requests, held-out sequences and samples, and counts zeros in all of them.

    Args:
        predictors: Predictors that mask every forward pass; None to compute every neuron.
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
        self._harness = CountingHFLM(model, tokenizer, self._counter, batch_size)

    def __enter__(self) -> Self:
        self._counter.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._counter.__exit__()

    @torch.no_grad()
    def chunk(self, kind: str, arguments: Sequence[tuple[Any, ...]]) -> Chunk:
        return self._harness.chunk(kind, arguments)

    @torch.no_grad()
    def sequence(self, sequence: PackedSequence) -> tuple[Score, Counts]:
        """Negative log-likelihood of a sequence in nats with its number of labels, and the counts."""
        batch = {key: value.to(self._model.device) for key, value in collate([sequence]).items()}
        self._counter.begin()
        loss = float(summed_loss(self._model, batch))
        labels = float((batch["labels"] != IGNORED_LABEL).sum())
        return Score(loss, labels), self._counter.taken()

    @torch.no_grad()
    def sample(self, prompt: str, num_tokens: int) -> Sample:
        """Continues a prompt greedily with a mild repetition penalty: deterministic for the same weights."""
        inputs = self._tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        inputs = {key: value.to(self._model.device) for key, value in inputs.items()}
        output = cast(Any, self._model).generate(
            **inputs,
            max_new_tokens=num_tokens,
            do_sample=False,
            repetition_penalty=REPETITION_PENALTY,
            pad_token_id=self._tokenizer.eos_token_id,
        )
        new_tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        text = self._tokenizer.decode(new_tokens, skip_special_tokens=True)
        return Sample(prompt=prompt, text=str(text))


Method = Literal["chunk", "sequence", "sample"]
SHARED_MEMORY = Path("/dev/shm")


class WorkerPool(Protocol):
    """Maps methods of an EvalWorker over items, inside its context."""

    device: str
    """Type of the device that computes."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: object, error: object, trace: object, /) -> None: ...

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]: ...


class ProcessPool:
    """Context manager that maps methods of an EvalWorker over items, in this process or in several.

    Args:
        model: A sparse model in evaluation mode; on the CPU if there are several processes.
        processes: Number of processes; 1 computes in this one.

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
        self._own: EvalWorker | None = None
        self._pool: ProcessPoolExecutor | None = None
        self.device = "cuda" if processes > 1 and torch.cuda.is_available() else model.device.type
        if processes == 1:
            self._own = EvalWorker(model, tokenizer, batch_size, predictors)
            return
        _check_shared_memory(model)
        _raise_file_limit(model)
        context = multiprocessing.get_context("spawn")
        devices = context.Queue()
        for index in range(processes):
            count = torch.cuda.device_count()
            devices.put(f"cuda:{index % count}" if count else "cpu")
        threads = max(1, torch.get_num_threads() // processes)
        # Not an Event: setting one waits for every listener, including processes that were killed.
        self._stop_receiver, self._stop_sender = context.Pipe(duplex=False)
        arguments = (model, tokenizer, batch_size, predictors)
        self._pool = ProcessPoolExecutor(
            processes, context, _start_worker, (self._stop_receiver, devices, threads, arguments)
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
                self._stop_sender.send_bytes(b"stop")  # running items would be discarded anyway
            self._pool.shutdown(cancel_futures=True)

    def map(self, method: Method, items: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """Results of a method of EvalWorker for the arguments of each item, in order."""
        if self._own is not None:
            yield from (getattr(self._own, method)(*item) for item in items)
            return
        assert self._pool is not None
        try:
            yield from self._pool.map(_call, [method] * len(items), items)
        except BrokenProcessPool as error:
            raise EvaluationError(
                "An evaluation process was killed, possibly because memory ran out.",
                next_step="Repeat the command with fewer --processes or a smaller --batch-size; it resumes where it "
                "stopped.",
            ) from error


_worker: EvalWorker | None = None
"""The worker of a pool's process."""


def _start_worker(stop: Connection, devices: Queue[str], threads: int, arguments: tuple[Any, ...]) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process decides
    threading.Thread(target=_exit_on_stop, args=(stop,), daemon=True).start()
    torch.set_num_threads(threads)
    model, tokenizer, batch_size, predictors = arguments
    device = devices.get()
    if device != "cpu":
        torch.nn.Module.to(model, device)
    _worker = EvalWorker(model, tokenizer, batch_size, predictors).__enter__()


def _exit_on_stop(stop: Connection) -> None:
    """Ends this process on a stop message, or when its parent has died."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([stop, parent.sentinel])
    os._exit(1)


def _call(method: Method, item: tuple[Any, ...]) -> Any:
    assert _worker is not None
    return getattr(_worker, method)(*item)


def _check_shared_memory(model: SparseModel) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else size
    if size > free:
        raise EvaluationError(
            f"The processes share one copy of the model of {size / 1e9:.2f} GB, but {SHARED_MEMORY} has only "
            f"{free / 1e9:.2f} GB free.",
            next_step="Give the container more shared memory (docker run --shm-size), or omit --processes.",
        )


def _raise_file_limit(model: SparseModel) -> None:
    """Raises the limit on open files: every shared tensor needs a file descriptor."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = soft + 2 * len(model.state_dict())
    needed = min(hard, wanted) if hard != resource.RLIM_INFINITY else soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
