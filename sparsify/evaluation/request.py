"""Evaluation requests, from a command or from a recipe: suite, data, settings, and the name of the results' folder."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import EvaluationError
from sparsify.evaluation.suite import Suite, load_suite
from sparsify.evaluation.tasks import TaskSource, check_code, check_hub_names, task_sources
from sparsify.metadata import user_path
from sparsify.recipe.evaluation import EvalSection

DATA_VARIABLE = "SPARSIFY_EVAL_DATA"


def check_installed() -> None:
    """Raises EvaluationError, with the command that installs it, if lm-evaluation-harness is missing."""
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "Evaluation needs lm-evaluation-harness, which is not installed.",
            next_step="pip install 'sparsify-lm[eval]', or in a checkout: pip install -e '.[eval]'",
        )


def data_folder(given: Path, setting: str) -> Path:
    """The folder of local copies of evaluation sets. Raises EvaluationError, naming `setting`, if it does not exist."""
    folder = user_path(given)
    if not folder.is_dir():
        raise EvaluationError(
            f"There is no folder {given} with evaluation data.",
            next_step=f"Correct {setting} or {DATA_VARIABLE}, or omit both to read the Hub's data.",
        )
    return folder


def data_dir_of(settings: EvalSection) -> Path | None:
    """Folder of local copies, from the recipe or from SPARSIFY_EVAL_DATA; None for the Hub's data.

    Raises:
        EvaluationError: If the folder does not exist.
    """
    given = settings.suite_data_dir or os.environ.get(DATA_VARIABLE)
    return None if given is None else data_folder(Path(given), "eval.suite_data_dir")


def suite_of(settings: EvalSection) -> tuple[Suite, list[TaskSource]] | None:
    """The suite of a recipe and its tasks; None if the recipe has no suite. Reads no data.

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


def check_suite_code(settings: EvalSection) -> None:
    """Raises EvaluationError if a recipe's suite cannot be read, or runs code that the user did not trust."""
    found = suite_of(settings)
    if found is not None:
        check_code(found[1])


def suite_code(settings: EvalSection) -> str:
    """A sentence on what a recipe's suite would import, for who only reads the recipe; empty if it imports nothing."""
    found = suite_of(settings)
    code = [name for source in found[1] for name in source.code] if found else []
    return f"The suite runs Python code of its own, which needs --trust-code: {'; '.join(code)}." if code else ""


@dataclass(frozen=True)
class EvalRequest:
    """Arguments of one evaluation.

    Attributes:
        tasks: Tasks to run; empty for all tasks and the suite's held-out text.
        limit: Maximum number of items per task; None for all.
        dtype: Type to convert the weights to; None to keep theirs.
        on: Mixture whose held-out text is evaluated; None for the mixture of the run, or of the quickstart if the model
            is not a run.
        predictors: Folder of predictors that mask the model; None to compute every neuron.
    """

    suite: str
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    on: str | None = None
    to: Path | None = None
    predictors: Path | None = None
    processes: int = 1

    @classmethod
    def from_recipe(cls, settings: EvalSection) -> EvalRequest:
        assert settings.suite is not None
        return cls(
            settings.suite,
            data_dir=data_dir_of(settings),
            limit=settings.suite_limit,
            batch_size=settings.suite_batch_size,
        )

    @property
    def name(self) -> str:
        name = ",".join([Path(self.suite).stem, *self.tasks])
        if self.limit is not None:
            name += f",limit={self.limit}"
        if self.dtype is not None:
            name += f",{self.dtype}"
        return name + (",predictors" if self.predictors is not None else "")

    @property
    def key(self) -> str:
        """Key that is equal for evaluations with comparable results."""
        data_dir = str(self.data_dir)
        return repr((self.suite, self.tasks, data_dir, self.limit, self.dtype, self.on))
