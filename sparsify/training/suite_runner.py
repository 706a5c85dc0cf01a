"""Evaluates a run with its suite during training, at a checkpoint that was just saved.

Under ZeRO 0 to 2 every rank holds the whole model, and the ranks evaluate together with the live weights. Under ZeRO 3 no rank
does: rank 0 starts a child process that loads the checkpoint, and all ranks wait for it. Neither changes the training.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerFast

from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import RunError
from sparsify.evaluation.evaluate import EvalSettings, evaluate
from sparsify.evaluation.rank_pool import RankPool, RankQueue, Stopped, run_on
from sparsify.evaluation.report import write_results
from sparsify.evaluation.request import EvalRequest, suite_of
from sparsify.evaluation.results import EvaluationResults, SourceOverlap, read_results
from sparsify.evaluation.subject import Subject
from sparsify.evaluation.worker_pool import EvalWorker
from sparsify.launch.child import Child, module_command
from sparsify.methods.live_model import Engine, evaluating
from sparsify.methods.objective import as_saved
from sparsify.models import SparseModel
from sparsify.recipe.recipe import Recipe
from sparsify.runs.run_folder import POLL_SECONDS, RunFolder
from sparsify.runs.state import checkpoint_name
from sparsify.training.kernels.activation import unfused
from sparsify.training.session import Session
from sparsify.training.suite_results import (
    command_of,
    evaluation_folder,
    held_out_text,
    items_in_instructions,
    provenance_of,
    suite_is_logged,
    task_figures,
    write_line,
)

logger = logging.getLogger(__name__)

ROOM = 1.3
"""Free GPU memory that a second copy of the weights needs, as a multiple of its size."""


class TrainingSuite:
    """A run's suite; every rank has one.

    Args:
        recipe: The run's recipe, which names a suite.
        run: The run's folder.
        program: Evaluates a checkpoint in a process of its own; a run under ZeRO 3 needs it.
    """

    def __init__(self, recipe: Recipe, run: RunFolder, program: ModuleType | None) -> None:
        self._recipe, self._run, self._program = recipe, run, program
        self._overlaps: dict[str, list[SourceOverlap]] | None = None

    def measure(self, session: Session) -> bool:
        """Evaluates the newest checkpoint, whose weights the engine still holds, unless that was done before.

        Every rank calls it.

        Returns:
            Whether the evaluation is finished; False when a rank received a stop request: the next launch resumes it.

        Raises:
            EvaluationError: If the suite, a task or its data is missing.
            RunError: If memory runs out.
            StorageError: If writing fails.
        """
        engine, state, telemetry = session.engine, session.state, session.telemetry
        queue = RankQueue(session.stop_requested)
        saved = engine.zero_optimization_partition_weights()
        if queue.rank:
            return queue.serve() if saved else self._serve(queue, session)
        if suite_is_logged(self._recipe, self._run, state.step):
            queue.end(finished=True)
            return True
        started = time.monotonic()
        checkpoint = self._run.checkpoints / checkpoint_name(state.step)
        request = EvalRequest.from_recipe(self._recipe.eval)
        folder = evaluation_folder(self._run, checkpoint.name, request)
        try:
            results = (
                self._run_in_child(queue, engine, checkpoint, folder)
                if saved
                else self._run_live(queue, session, checkpoint, request, folder)
            )
        except Stopped:
            queue.end(finished=False)
            return False
        write_line(self._run, checkpoint, request, folder, results)
        where = str(folder.relative_to(self._run.path))
        seconds = time.monotonic() - started
        parts = "  ".join(f"{task.name} {task.score.value:.3f}" for task in results.tasks)
        telemetry.record(
            "suite",
            state.step,
            state.seen_tokens,
            f"suite {results.suite}: {parts}  ({seconds:.1f} s)",
            suite=results.suite,
            tasks=task_figures(results),
            folder=where,
            seconds=round(seconds, 3),
        )
        queue.end(finished=True)
        return True

    def _serve(self, queue: RankQueue, session: Session) -> bool:
        with as_loaded(session) as model, self._worker(model, self._tokenizer()) as worker:
            return queue.serve(run_on(worker))

    def _run_live(
        self,
        queue: RankQueue,
        session: Session,
        checkpoint: Path,
        request: EvalRequest,
        folder: Path,
    ) -> EvaluationResults:
        recipe, found = self._recipe, suite_of(self._recipe.eval)
        assert found is not None
        suite, sources = found
        tokenizer = self._tokenizer()
        held_out = held_out_text(
            recipe.mixture,
            tokenizer,
            suite.held_out_sequences_per_source,
            recipe.training.sequence_length,
            recipe.cache_dir,
        )
        name, lock = str(checkpoint), self._run.mixture_lock
        provenance = provenance_of(str(self._run.path), recipe, lock, checkpoint)
        settings = EvalSettings(request.limit, request.batch_size, queue.world)
        with as_loaded(session) as model:
            subject = Subject(model, tokenizer, name, provenance)
            ranks = RankPool(queue, self._worker(model, tokenizer), model.device.type)
            results = evaluate(subject, suite, sources, held_out, folder, settings, pool=ranks)
        results.command = command_of(checkpoint, request)
        if self._overlaps is None:
            self._overlaps = items_in_instructions(results, folder, recipe)
        for task in results.tasks:
            task.overlaps = self._overlaps.get(task.name, [])
        write_results(results, folder)
        return results

    def _run_in_child(
        self,
        queue: RankQueue,
        engine: Engine,
        checkpoint: Path,
        folder: Path,
    ) -> EvaluationResults:
        assert self._program is not None
        worker = Child(
            "the suite's process",
            module_command(self._program, str(checkpoint)),
            self._run.logs / "suite.log",
            environment=_worker_environment(engine),
        )
        try:
            while worker.poll() is None:
                queue.check()
                time.sleep(POLL_SECONDS)
        finally:
            worker.kill()  # its journal is on the disk
        if worker.poll():
            raise worker.error()
        return read_results(folder)

    def _tokenizer(self) -> PreTrainedTokenizerFast:
        # One of its own: lm-evaluation-harness gives it a padding token.
        return load_tokenizer(self._run.initial)

    def _worker(self, model: SparseModel, tokenizer: PreTrainedTokenizerFast) -> EvalWorker:
        return EvalWorker(model, tokenizer, self._recipe.eval.suite_batch_size)


@contextmanager
def as_loaded(session: Session) -> Iterator[SparseModel]:
    """The live model as `sparsify evaluate` would load it: plain activation, the model's own code, no gradients.

    Restores model and random number generators afterwards.

    Raises:
        RunError: If memory runs out.
    """
    engine, model = session.engine, session.engine.module
    attention = str(model.config._attn_implementation)
    with ExitStack() as stack:
        objectives = as_saved(session.objectives)
        for context in (_random_numbers(), evaluating(engine), objectives, unfused(model)):
            stack.enter_context(context)
        if attention != "sdpa":
            stack.callback(model.set_attn_implementation, attention)
            model.set_attn_implementation("sdpa")
        try:
            yield model
        except torch.OutOfMemoryError as error:
            raise RunError(
                f"Rank {dist.get_rank()} ran out of memory while it ran the suite: {str(error).splitlines()[0]}",
                next_step="Set a lower eval.suite_batch_size, or eval.suite=null; the same command resumes from the "
                "checkpoint.",
            ) from error
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # its tensors have other shapes than those of the training


@contextmanager
def _random_numbers() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    try:
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _worker_environment(engine: Engine) -> dict[str, str]:
    """Environment of a process that is not a rank: on this rank's GPU if all weights fit there, otherwise on the CPU."""
    place = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {key: value for key, value in os.environ.items() if key not in place}
    threads = int(os.environ.get("OMP_NUM_THREADS", "1")) * int(os.environ.get("LOCAL_SIZE", "1"))
    environment["OMP_NUM_THREADS"] = str(threads)  # those of the ranks that wait
    if not torch.cuda.is_available():
        return environment
    size = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in engine.module.parameters())
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    on_gpu = free > ROOM * size
    environment["CUDA_VISIBLE_DEVICES"] = (gpus[0] or "0") if on_gpu else ""
    if not on_gpu:
        logger.info(
            f"The suite runs on the CPU: the weights need {size / 1e9:.1f} GB, and the GPU has {free / 1e9:.1f} GB free."
        )
    return environment
