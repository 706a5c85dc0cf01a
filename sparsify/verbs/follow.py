"""`sparsify evaluate RUN --follow`: every checkpoint of a run, while it trains.

A process of its own reads saved checkpoints. So it is the same for every ZeRO stage, and training never waits for it, as it does for
`eval.suite`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sparsify.errors import EvaluationError, ModelError, RunError
from sparsify.evaluation.asked import Asked
from sparsify.evaluation.results import EvaluationResults
from sparsify.training.checkpoints import STATE, read_state
from sparsify.training.evaluations import has_line, write_line
from sparsify.training.run_folder import RunFolder
from sparsify.verbs import Say
from sparsify.verbs.evaluate import evaluate_model

if TYPE_CHECKING:
    from sparsify.evaluation.asking import Progress

POLL_SECONDS = 10.0


def follow(
    run_folder: str,
    asked: Asked,
    command: str,
    say: Say,
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
            results = _measure(run, checkpoint, asked, command, say, on_progress)
            found += [results] if results is not None else []
        last = _checkpoints(run)[-1:]
        if last and read_state(last[0]).step >= num_steps and has_line(run, last[0], asked):
            return found
        if not waiting:
            say(f"Waiting for checkpoints of {run.path}; Ctrl-C ends that and changes nothing.")
            waiting = True
        time.sleep(poll_seconds)


def _checkpoints(run: RunFolder) -> list[Path]:
    return sorted(path for path in run.checkpoints.glob("step-*") if (path / STATE).is_file())


def _measure(
    run: RunFolder,
    checkpoint: Path,
    asked: Asked,
    command: str,
    say: Say,
    on_progress: Callable[[str], Progress],
) -> EvaluationResults | None:
    try:
        results, folder = evaluate_model(str(checkpoint), asked, command, say, on_progress)
    except (OSError, ModelError, RunError):
        if checkpoint.is_dir():
            raise
        say(f"{checkpoint.name} was removed by the training before it was measured.")
        return None
    write_line(run, checkpoint, asked, folder, results)
    return results
