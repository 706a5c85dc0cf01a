"""`sparsify evaluate`: runs a suite on a model, or with --follow on every checkpoint of a run while it trains.

--follow reads saved checkpoints in a separate process: it works the same for every ZeRO stage, and the training does not wait
for it (it does for `eval.suite`).
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsify.conversion.source_checkpoint import locate
from sparsify.errors import EvaluationError, ModelError, RunError
from sparsify.evaluation.held_out_perplexity import HeldOut
from sparsify.evaluation.request import EvalRequest, check_installed, data_folder
from sparsify.evaluation.results import EvaluationResults, Provenance
from sparsify.evaluation.suite import Suite, load_suite, only
from sparsify.metadata import user_path
from sparsify.predictors import Predictors, read_predictors
from sparsify.recipe.compose import load_mixture, load_recipe
from sparsify.recipe.recipe import CACHE_DIR, Recipe
from sparsify.runs.load import Loaded, load
from sparsify.runs.run_folder import RunFolder
from sparsify.runs.state import STATE, read_state
from sparsify.training.suite_results import (
    EVALUATIONS,
    evaluation_folder,
    has_line,
    held_out_text,
    items_in_instructions,
    provenance_of,
    write_line,
)

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sparsify.evaluation.lm_adapter import Progress

MAX_SEQUENCE_LENGTH = 512
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def evaluate_model(
    model: str,
    request: EvalRequest,
    command: str,
    on_progress: Callable[[str], Progress],
) -> tuple[EvaluationResults, Path]:
    """Runs a suite on a model and writes the results.

    Raises:
        EvaluationError: If the suite, a task or its data is missing; if possible, before the model is loaded.
        ModelError, RunError: If the model cannot be loaded, or the predictors belong to another one.
    """
    if request.dtype is not None and request.dtype not in DTYPES:
        raise EvaluationError(f"Unsupported --dtype {request.dtype}.", allowed=f"{', '.join(DTYPES)}.")
    suite = load_suite(request.suite)
    if request.tasks:
        suite = only(suite, list(request.tasks))
    check_installed()
    from sparsify.evaluation.evaluate import EvalSettings, evaluate
    from sparsify.evaluation.report import write_results
    from sparsify.evaluation.subject import Subject
    from sparsify.evaluation.tasks import check_code, task_sources

    if request.on is not None and not suite.held_out_sequences_per_source:
        raise EvaluationError(
            f"--on {request.on}: suite {suite.name} has no held-out text.",
            next_step="Omit --on, or set held_out_sequences_per_source in your own suite.",
        )
    data_dir = None if request.data_dir is None else data_folder(request.data_dir, "--data-dir")
    sources = task_sources(suite, data_dir)
    check_code(sources)
    predictors = None if request.predictors is None else read_predictors(user_path(request.predictors))
    loaded = load(model)
    if predictors is not None:
        predictors.check_model(loaded.model, str(request.predictors))
    if request.dtype is not None:
        torch.nn.Module.to(loaded.model, DTYPES[request.dtype])
    if torch.cuda.is_available() and request.processes == 1:
        torch.nn.Module.to(loaded.model, "cuda")
    held_out = _held_out(loaded, suite, request.on)
    folder = request.to or default_folder(loaded, request)
    named = None if predictors is None else (str(request.predictors), predictors)
    logger.info(f"Evaluating {loaded.name}: suite {suite.name}{_how(request, predictors)}")
    subject = Subject(loaded.model, loaded.tokenizer, loaded.name, provenance(loaded), named)
    settings = EvalSettings(request.limit, request.batch_size, request.processes)
    results = evaluate(subject, suite, sources, held_out, folder, settings, on_progress=on_progress)
    results.command = command
    if subject.provenance is not None:
        found = items_in_instructions(results, folder, _recipe_of(loaded))
        for task in results.tasks:
            task.overlaps = found.get(task.name, [])
    write_results(results, folder)
    return results, folder


def _how(request: EvalRequest, predictors: Predictors | None) -> str:
    words = ""
    if predictors is not None:
        words += f", only neurons that {request.predictors} scores above {predictors.facts.threshold:g}"
    if request.processes > 1:
        words += f", in {request.processes} processes"
    return words


def default_folder(loaded: Loaded, request: EvalRequest) -> Path:
    """RUN/evaluations/SUITE,STEP for a checkpoint of a run, evaluations/MODEL/SUITE for other models."""
    if loaded.trained is not None:
        return evaluation_folder(loaded.trained.run, loaded.trained.checkpoint.name, request)
    model = re.sub("[^-.0-9A-Za-z_]+", "-", loaded.name).strip("-.")
    return Path(EVALUATIONS) / model / request.name


def provenance(loaded: Loaded) -> Provenance | None:
    if loaded.trained is not None:
        run = loaded.trained.run
        return provenance_of(str(run.path), run.load_recipe(), run.mixture_lock, loaded.trained.checkpoint)
    training = locate(loaded.name) / "training"
    recipe = training / "recipe.yaml"
    if not recipe.is_file() or not (training / STATE).is_file():
        return None
    return provenance_of(loaded.name, load_recipe(recipe), training / "mixture.lock.json", training)


def _recipe_of(loaded: Loaded) -> Recipe:
    if loaded.trained is not None:
        return loaded.trained.run.load_recipe()
    return load_recipe(locate(loaded.name) / "training" / "recipe.yaml")


def _held_out(loaded: Loaded, suite: Suite, on: str | None) -> HeldOut | None:
    recipe = loaded.trained.run.load_recipe() if loaded.trained else None
    sequence_length = min(MAX_SEQUENCE_LENGTH, loaded.model.config.max_position_embeddings)
    if recipe is not None:
        sequence_length = recipe.training.sequence_length
    wanted = suite.held_out_sequences_per_source
    own = recipe.mixture if recipe is not None and on is None else None
    mixture = own if own is not None or not wanted else load_mixture(on or "quickstart")
    if mixture is None:
        return None
    cache_dir = recipe.cache_dir if recipe else CACHE_DIR
    return held_out_text(mixture, loaded.tokenizer, wanted, sequence_length, cache_dir)


FOLLOW_SECONDS = 10.0


def follow(
    run_folder: str,
    request: EvalRequest,
    command: str,
    on_progress: Callable[[str], Progress],
    poll_seconds: float = FOLLOW_SECONDS,
) -> list[EvaluationResults]:
    """Evaluates each new checkpoint of a run, until the last one of its budget.

    Every evaluation adds a line to RUN/evaluations.jsonl and a folder to RUN/evaluations/.

    Raises:
        EvaluationError: If the folder is not a run folder, or the request has an output folder or predictors.
    """
    run = RunFolder(user_path(run_folder))
    if not run.recipe.is_file():
        raise EvaluationError(
            f"{run_folder} is not a run folder: there are no checkpoints to follow.",
            next_step="Omit --follow, or give the folder that `sparsify train` printed.",
        )
    if request.to is not None:
        raise EvaluationError(
            "--to is one folder, but --follow writes one for each checkpoint.",
            next_step="Omit --to: the results go to the run's evaluations/.",
        )
    if request.predictors is not None:
        raise EvaluationError(
            "--predictors belong to one checkpoint, but --follow evaluates all of them.",
            next_step="Omit --predictors, or evaluate only the checkpoint that they were trained for.",
        )
    num_steps = run.load_recipe().num_steps
    found: list[EvaluationResults] = []
    waiting = False
    while True:
        for checkpoint in [one for one in _checkpoints(run) if not has_line(run, one, request)]:
            results = _measure(run, checkpoint, request, command, on_progress)
            found += [results] if results is not None else []
        last = _checkpoints(run)[-1:]
        if last and read_state(last[0]).step >= num_steps and has_line(run, last[0], request):
            return found
        if not waiting:
            logger.info(f"Waiting for checkpoints of {run.path}; Ctrl-C stops waiting and changes nothing.")
            waiting = True
        time.sleep(poll_seconds)


def _checkpoints(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / STATE).is_file())


def _measure(
    run: RunFolder,
    checkpoint: Path,
    request: EvalRequest,
    command: str,
    on_progress: Callable[[str], Progress],
) -> EvaluationResults | None:
    try:
        results, folder = evaluate_model(str(checkpoint), request, command, on_progress)
    except (OSError, ModelError, RunError):
        if checkpoint.is_dir():
            raise
        logger.info(f"The training removed {checkpoint.name} before it was evaluated.")
        return None
    write_line(run, checkpoint, request, folder, results)
    return results
