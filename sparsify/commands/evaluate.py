"""`sparsify evaluate`: finds model, suite and data, and measures.

`sparsify evaluate RUN --follow`: every checkpoint of a run, while it trains.

A process of its own reads saved checkpoints. So it is the same for every ZeRO stage, and training never waits for it, as it does for
`eval.suite`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sparsify.conversion.source import locate
from sparsify.errors import EvaluationError, ModelError, RunError
from sparsify.evaluation.heldout import HeldOut
from sparsify.evaluation.request import Asked, check_installed, data_folder
from sparsify.evaluation.results import EvaluationResults, Provenance
from sparsify.evaluation.suite import Suite, load_suite, only
from sparsify.predictors import Predictors, read_predictors
from sparsify.recipe.compose import load_mixture, load_recipe
from sparsify.recipe.recipe import Recipe
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
    asked: Asked,
    command: str,
    on_progress: Callable[[str], Progress],
) -> tuple[EvaluationResults, Path]:
    """Measures a suite on a model and writes what came out.

    Returns:
        The results and their folder.

    Raises:
        EvaluationError: If the suite, a task or its data is missing, before the model is loaded where that can be.
        ModelError, RunError: If the model cannot be loaded, or the predictors belong to another one.
    """
    if asked.dtype is not None and asked.dtype not in DTYPES:
        raise EvaluationError(
            f"--dtype {asked.dtype} is no type to compute in.", allowed=f"{', '.join(DTYPES)}."
        )
    suite = load_suite(asked.suite)
    if asked.tasks:
        suite = only(suite, list(asked.tasks))
    check_installed()
    from sparsify.evaluation.evaluate import Settings, evaluate
    from sparsify.evaluation.model import Subject
    from sparsify.evaluation.report import write_results
    from sparsify.evaluation.tasks import task_sources

    if asked.on is not None and not suite.held_out_sequences_per_source:
        raise EvaluationError(
            f"--on {asked.on}: suite {suite.name} measures no held-out text.",
            next_step="Leave --on out, or set held_out_sequences_per_source in a suite of your own.",
        )
    data_dir = None if asked.data_dir is None else data_folder(asked.data_dir, "--data-dir")
    sources = task_sources(suite, data_dir)
    predictors = (
        None if asked.predictors is None else read_predictors(asked.predictors.expanduser())
    )
    loaded = load(model)
    if predictors is not None:
        predictors.check_model(loaded.model, str(asked.predictors))
    if asked.dtype is not None:
        torch.nn.Module.to(loaded.model, DTYPES[asked.dtype])
    if torch.cuda.is_available() and asked.processes == 1:
        torch.nn.Module.to(loaded.model, "cuda")
    held_out = _held_out(loaded, suite, asked.on)
    folder = asked.to or default_folder(loaded, asked)
    named = None if predictors is None else (str(asked.predictors), predictors)
    logger.info(f"Measuring {loaded.name}: suite {suite.name}{_how(asked, predictors)}")
    subject = Subject(loaded.model, loaded.tokenizer, loaded.name, provenance(loaded), named)
    settings = Settings(asked.limit, asked.batch_size, asked.processes)
    results = evaluate(subject, suite, sources, held_out, folder, settings, on_progress=on_progress)
    results.command = command
    if subject.provenance is not None:
        found = items_in_instructions(results, folder, _recipe_of(loaded))
        for task in results.tasks:
            task.overlaps = found.get(task.name, [])
    write_results(results, folder)
    return results, folder


def _how(asked: Asked, predictors: Predictors | None) -> str:
    words = ""
    if predictors is not None:
        words += (
            f", only neurons that {asked.predictors} scores above {predictors.facts.threshold:g}"
        )
    if asked.processes > 1:
        words += f", in {asked.processes} processes"
    return words


def default_folder(loaded: Loaded, asked: Asked) -> Path:
    """RUN/evaluations/SUITE,STEP for a checkpoint, else evaluations/MODEL/SUITE; with what else sets it apart."""
    if loaded.trained is not None:
        return evaluation_folder(loaded.trained.run, loaded.trained.checkpoint.name, asked)
    model = re.sub("[^-.0-9A-Za-z_]+", "-", loaded.name).strip("-.")
    return Path(EVALUATIONS) / model / asked.name


def provenance(loaded: Loaded) -> Provenance | None:
    """What is known of the training of a run's checkpoint or of an exported bundle; None for any other model."""
    if loaded.trained is not None:
        run = loaded.trained.run
        return provenance_of(
            str(run.path), run.load_recipe(), run.mixture_lock, loaded.trained.checkpoint
        )
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
    cache_dir = (recipe or Recipe()).cache_dir
    return held_out_text(mixture, loaded.tokenizer, wanted, sequence_length, cache_dir)


POLL_SECONDS = 10.0


def follow(
    run_folder: str,
    asked: Asked,
    command: str,
    on_progress: Callable[[str], Progress],
    poll_seconds: float = POLL_SECONDS,
) -> list[EvaluationResults]:
    """Measures each checkpoint of a run that was not measured so yet, until the last one of its budget.

    Every evaluation is a line of RUN/evaluations.jsonl, and has a folder in RUN/evaluations/.

    Returns:
        What was measured now, by step.

    Raises:
        EvaluationError: If it is no run folder, or one folder or predictors were asked for.
    """
    run = RunFolder(Path(run_folder).expanduser())
    if not run.recipe.is_file():
        raise EvaluationError(
            f"{run_folder} is no run folder: there are no checkpoints to follow.",
            next_step="Leave --follow out, or give the folder that `sparsify train` printed.",
        )
    if asked.to is not None:
        raise EvaluationError(
            "--to names one folder, and --follow writes one for each checkpoint.",
            next_step="Leave --to out: they are written into the run's evaluations/.",
        )
    if asked.predictors is not None:
        raise EvaluationError(
            "--predictors belong to one checkpoint, and --follow measures all of them.",
            next_step="Leave --predictors out, or evaluate the checkpoint that they were trained for.",
        )
    num_steps = run.load_recipe().num_steps
    found: list[EvaluationResults] = []
    waiting = False
    while True:
        waited_for = [path for path in _checkpoints(run) if not has_line(run, path, asked)]
        for checkpoint in waited_for:
            results = _measure(run, checkpoint, asked, command, on_progress)
            found += [results] if results is not None else []
        last = _checkpoints(run)[-1:]
        if last and read_state(last[0]).step >= num_steps and has_line(run, last[0], asked):
            return found
        if not waiting:
            logger.info(
                f"Waiting for checkpoints of {run.path}; Ctrl-C ends that and changes nothing."
            )
            waiting = True
        time.sleep(poll_seconds)


def _checkpoints(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / STATE).is_file())


def _measure(
    run: RunFolder,
    checkpoint: Path,
    asked: Asked,
    command: str,
    on_progress: Callable[[str], Progress],
) -> EvaluationResults | None:
    try:
        results, folder = evaluate_model(str(checkpoint), asked, command, on_progress)
    except (OSError, ModelError, RunError):
        if checkpoint.is_dir():
            raise
        logger.info(f"{checkpoint.name} was removed by the training before it was measured.")
        return None
    write_line(run, checkpoint, asked, folder, results)
    return results
