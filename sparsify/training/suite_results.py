"""The evaluations of a run's checkpoints: where they stand, what is known of the training, and the line of each."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from sparsify.evaluation.heldout import PREFIX, HeldOut
from sparsify.evaluation.overlap import overlaps
from sparsify.evaluation.request import Asked
from sparsify.evaluation.results import EvaluationResults, Provenance, SourceOverlap
from sparsify.files import storage_errors
from sparsify.mixture.lock import read_lock
from sparsify.mixture.sequences.held_out import source_sequences
from sparsify.mixture.sequences.shares import token_shares
from sparsify.recipe.mixture import MixtureSection
from sparsify.recipe.recipe import Recipe
from sparsify.runs.history import read_lines
from sparsify.runs.identity import identity_of
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import TrainingState, checkpoint_name, crosses, read_state

logger = logging.getLogger(__name__)

EVALUATIONS = "evaluations"
LINES_FILE = "evaluations.jsonl"


def evaluation_folder(run: RunFolder, checkpoint: str, asked: Asked) -> Path:
    """Where the results of a checkpoint stand: RUN/evaluations/SUITE,STEP, with what else sets it apart."""
    return run.path / EVALUATIONS / f"{asked.name},{checkpoint}"


def provenance_of(run: str, recipe: Recipe, lock_file: Path, checkpoint: Path) -> Provenance:
    """What is known of the training of a checkpoint, or of an exported bundle's `training/`."""
    identity = repr(identity_of(recipe, read_lock(lock_file)))
    shares = token_shares(recipe.mixture)
    return Provenance(
        run=run,
        identity=hashlib.blake2b(identity.encode(), digest_size=16).hexdigest(),
        tokens=read_state(checkpoint).seen_tokens,
        instruction_sources=[
            name for name in shares if recipe.mixture.sources[name].group == "instruction"
        ],
    )


def held_out_text(
    mixture: MixtureSection,
    tokenizer: PreTrainedTokenizerFast,
    sequences_per_source: int,
    sequence_length: int,
    cache_dir: str,
) -> HeldOut | None:
    """The held-out sequences that a suite measures; None where it measures none."""
    if not sequences_per_source:
        return None
    sequences = source_sequences(
        mixture,
        tokenizer,
        sequences_per_source=sequences_per_source,
        sequence_length=sequence_length,
        cache_dir=Path(cache_dir).expanduser(),
    )
    return HeldOut(mixture.name, sequences)


def items_in_instructions(
    results: EvaluationResults, folder: Path, recipe: Recipe
) -> dict[str, list[SourceOverlap]]:
    """For each task, which of its items stand in the run's instruction data."""
    sources = results.provenance.instruction_sources if results.provenance else []
    tasks = [task.name for task in results.tasks if not task.name.startswith(PREFIX)]
    if not sources or not tasks:
        return {}
    logger.info(f"Looking for the items in instruction data: {', '.join(sources)}")
    return overlaps(folder, tasks, recipe.mixture, sources)


def task_figures(results: EvaluationResults) -> dict[str, dict[str, Any]]:
    """The score of each task with its interval, its zeros and the parameters that a token needed, as a line has them."""
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
    run: RunFolder, checkpoint: Path, asked: Asked, folder: Path, results: EvaluationResults
) -> None:
    """Adds an evaluation to RUN/evaluations.jsonl.

    Raises:
        StorageError: If the disk refuses.
    """
    line = {
        "checkpoint": checkpoint.name,
        "tokens": read_state(checkpoint).seen_tokens,
        "key": asked.key,
        "folder": str(folder.relative_to(run.path)),
        "tasks": task_figures(results),
    }
    path = run.path / LINES_FILE
    with storage_errors(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def has_line(run: RunFolder, checkpoint: Path, asked: Asked) -> bool:
    """Whether a checkpoint was measured in this way."""
    return any(
        line["checkpoint"] == checkpoint.name and line["key"] == asked.key
        for line in read_lines(run.path / LINES_FILE)
    )


def suite_is_due(recipe: Recipe, state: TrainingState) -> bool:
    """Whether the suite is asked after this step; a checkpoint is saved there, too."""
    if recipe.eval.suite is None or state.step == 0:
        return False
    every = recipe.eval.suite_every_tokens or recipe.checkpoint.every_tokens
    at_end = state.step == recipe.num_steps
    return at_end or crosses(every, state.seen_tokens, recipe.step_tokens)


def suite_is_logged(recipe: Recipe, run: RunFolder, step: int) -> bool:
    """Whether metrics.jsonl has the recipe's suite at this step."""
    asked = Asked.by_recipe(recipe.eval)
    folder = evaluation_folder(run, checkpoint_name(step), asked)
    where = str(folder.relative_to(run.path))
    return any(
        line["kind"] == "suite" and line["step"] == step and line["folder"] == where
        for line in read_lines(run.metrics)
    )
