"""The suite that a recipe has its run asked: found, with its tasks and their data, before anything costs time."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from sparsify.errors import EvaluationError
from sparsify.evaluation.suite import Suite, load_suite
from sparsify.evaluation.tasks import TaskSource, check_hub_names, task_sources
from sparsify.recipe_evaluation import EvalSection

DATA_VARIABLE = "SPARSIFY_EVAL_DATA"


def check_installed() -> None:
    """Refuses to go on without lm-evaluation-harness.

    Raises:
        EvaluationError: With the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "Evaluation needs lm-evaluation-harness, which is not installed.",
            next_step="pip install 'sparsify-lm[eval]', or in a checkout: pip install -e '.[eval]'",
        )


def data_folder(given: Path, setting: str) -> Path:
    """The folder of local copies.

    Args:
        given: As it was named.
        setting: By what, beside SPARSIFY_EVAL_DATA.

    Raises:
        EvaluationError: If there is none.
    """
    folder = given.expanduser()
    if not folder.is_dir():
        raise EvaluationError(
            f"There is no folder {given} with evaluation data.",
            next_step=f"Correct {setting} or {DATA_VARIABLE}, or leave both out to read the Hub's data.",
        )
    return folder


def data_dir_of(settings: EvalSection) -> Path | None:
    """Folder of local copies: that of the recipe, or else of SPARSIFY_EVAL_DATA; None for the Hub's data.

    Raises:
        EvaluationError: If there is no such folder.
    """
    given = settings.suite_data_dir or os.environ.get(DATA_VARIABLE)
    return None if given is None else data_folder(Path(given), "eval.suite_data_dir")


def suite_of(settings: EvalSection) -> tuple[Suite, list[TaskSource]] | None:
    """The suite of a recipe and its tasks; None where it asks none. Reads no data.

    Raises:
        EvaluationError: If lm-evaluation-harness, the suite, a task or its local copies are missing.
    """
    if settings.suite is None:
        return None
    suite = load_suite(settings.suite)
    check_installed()
    sources = task_sources(suite, data_dir_of(settings))
    check_hub_names(sources)
    return suite, sources
