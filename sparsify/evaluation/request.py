"""Evaluation requests, from a command or from a recipe: suite, data, settings, and the name of the results' folder."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from sparsify.errors import EvaluationError
from sparsify.evaluation.suite import Suite, load_suite
from sparsify.evaluation.tasks import TaskSource, check_hub_names, task_sources
from sparsify.recipe.evaluation import EvalSection

DATA_VARIABLE = "SPARSIFY_EVAL_DATA"


def check_installed() -> None:
    """Checks that lm-evaluation-harness is installed.

    Raises:
        EvaluationError: If it is not, with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError(
            "Evaluation needs lm-evaluation-harness, which is not installed.",
            next_step="pip install 'sparsify-lm[eval]', or in a checkout: pip install -e '.[eval]'",
        )


def data_folder(given: Path, setting: str) -> Path:
    """The folder of local copies of evaluation sets.

    Args:
        given: The path that the user gave.
        setting: Name of the setting that holds it, for the error message.

    Raises:
        EvaluationError: If the folder does not exist.
    """
    folder = given.expanduser()
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


@dataclass(frozen=True)
class EvalRequest:
    """Arguments of one evaluation.

    Attributes:
        suite: Name or path of a suite.
        tasks: Tasks to run; empty for all tasks and the suite's held-out text.
        data_dir: Folder of local copies; None for the Hub's data.
        limit: Maximum number of items per task; None for all.
        batch_size: Requests per forward pass.
        dtype: Type to convert the weights to; None to keep theirs.
        on: Mixture whose held-out text is evaluated; None for the mixture of the run, or of the quickstart if the model
            is not a run.
        to: Output folder; None for the default.
        predictors: Folder of predictors that mask the model; None to compute every neuron.
        processes: Number of processes.
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
        """The request of a recipe, which must name a suite.

        Raises:
            EvaluationError: If the recipe's folder of local copies does not exist.
        """
        assert settings.suite is not None
        return cls(
            settings.suite,
            data_dir=data_dir_of(settings),
            limit=settings.suite_limit,
            batch_size=settings.suite_batch_size,
        )

    @property
    def name(self) -> str:
        """Name of the results' folder, without the model."""
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
