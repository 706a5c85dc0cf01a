"""Evaluations of a run's checkpoints: their folders, the provenance of the model, and their lines in evaluations.jsonl."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.held_out_perplexity import PREFIX, HeldOut
from sparsify.evaluation.overlap import overlaps
from sparsify.evaluation.request import EvalRequest
from sparsify.evaluation.results import EvaluationResults, Provenance, SourceOverlap
from sparsify.files import storage_errors
from sparsify.metadata import user_path
from sparsify.mixture.lock import read_lock
from sparsify.mixture.sequences.held_out import source_sequences
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.recipe import Recipe
from sparsify.runs.data import identity_of
from sparsify.runs.history import read_lines
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState, checkpoint_name, crosses, read_state

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations"
LINES_FILE = "evaluations.jsonl"


def evaluation_folder(run: RunFolder, checkpoint: str, request: EvalRequest) -> Path:
    """Results' folder of a checkpoint: RUN/evaluations/SUITE[,settings],STEP."""
    return run.path / EVALUATIONS / f"{request.name},{checkpoint}"


def provenance_of(run: str, recipe: Recipe, lock_file: Path, checkpoint: Path) -> Provenance:
    identity = repr(identity_of(recipe, read_lock(lock_file)))
    shares = token_shares(recipe.mixture)
    return Provenance(
        run=run,
        identity=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        tokens=read_state(checkpoint).seen_tokens,
        instruction_sources=[name for name in shares if recipe.mixture.sources[name].group == "instruction"],
    )


def held_out_text(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    sequences_per_source: int,
    sequence_length: int,
    cache_dir: str,
) -> HeldOut | None:
    if not sequences_per_source:
        return None
    sequences = source_sequences(
        mixture,
        tokenizer,
        sequences_per_source=sequences_per_source,
        sequence_length=sequence_length,
        cache_dir=user_path(cache_dir),
    )
    return HeldOut(mixture.name, sequences)


def items_in_instructions(results: EvaluationResults, folder: Path, recipe: Recipe) -> dict[str, list[SourceOverlap]]:
    """For each task, the overlap of its items with the run's instruction sources."""
    sources = results.provenance.instruction_sources if results.provenance else []
    tasks = [task.name for task in results.tasks if not task.name.startswith(PREFIX)]
    if not sources or not tasks:
        return {}
    logger.info(f"Looking for the items in instruction data: {', '.join(sources)}")
    return overlaps(folder, tasks, recipe.mixture, sources)


def task_figures(results: EvaluationResults) -> dict[str, dict[str, Any]]:
    """Score, interval, zeros and active parameters of each task, as a line of evaluations.jsonl holds them."""
    return {
        task.name: {
            "metric": task.metric,
            "value": task.score.value,
            "low": task.score.low,
            "high": task.score.high,
            "zeros": task.product_zeros,
            "active_parameters": task.active_parameters.perfect_predictor,
        }
        for task in results.tasks
    }


def write_line(
    run: RunFolder, checkpoint: Path, request: EvalRequest, folder: Path, results: EvaluationResults
) -> None:
    """Appends an evaluation to RUN/evaluations.jsonl.

    Raises:
        StorageError: If writing fails.
    """
    line = {
        "checkpoint": checkpoint.name,
        "tokens": read_state(checkpoint).seen_tokens,
        "key": request.key,
        "folder": str(folder.relative_to(run.path)),
        "tasks": task_figures(results),
    }
    path = run.path / LINES_FILE
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def has_line(run: RunFolder, checkpoint: Path, request: EvalRequest) -> bool:
    return any(
        line["checkpoint"] == checkpoint.name and line["key"] == request.key
        for line in read_lines(run.path / LINES_FILE)
    )


def suite_is_due(recipe: Recipe, state: TrainingState) -> bool:
    if recipe.eval.suite is None or state.step == 0:
        return False
    every = recipe.eval.suite_every_tokens or recipe.checkpoint.every_tokens
    at_end = state.step == recipe.num_steps
    return at_end or crosses(every, state.seen_tokens, recipe.step_tokens)


def suite_is_logged(recipe: Recipe, run: RunFolder, step: int) -> bool:
    request = EvalRequest.from_recipe(recipe.eval)
    folder = evaluation_folder(run, checkpoint_name(step), request)
    where = str(folder.relative_to(run.path))
    return any(
        line["kind"] == "suite" and line["step"] == step and line["folder"] == where for line in read_lines(run.metrics)
    )


def command_of(checkpoint: Path, request: EvalRequest) -> str:
    words = ["sparsify", "evaluate", str(checkpoint), "--suite", request.suite]
    if request.data_dir is not None:
        words += ["--data-dir", str(request.data_dir)]
    if request.limit is not None:
        words += ["--limit", str(request.limit)]
    return shlex.join([*words, "--batch-size", str(request.batch_size)])
