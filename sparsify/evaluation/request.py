"""The suite that a recipe has its run asked: found, with its tasks and their data, before anything costs time.

What is asked of a model, by a command or by the run that trains it, and under which name its results stand.
"""

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


@dataclass(frozen=True)
class Asked:
    """What is asked.

    Attributes:
        suite: Name or path of a suite.
        tasks: Some of its tasks; empty for all and its held-out text.
        data_dir: Folder of local copies; None for the Hub's.
        limit: Items of each task; None for all.
        batch_size: Requests of one forward pass.
        dtype: Of weights and computation; None for that of the weights.
        on: Mixture whose held-out text is measured; None for the run's own, else the quickstart's.
        to: Folder to write; None for the usual one.
        predictors: Folder of predictors that mask the model; None to compute every neuron.
        processes: How many answer.
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
    def by_recipe(cls, settings: EvalSection) -> Asked:
        """What a recipe has its run asked; it must name a suite.

        Raises:
            EvaluationError: If there is no folder of local copies where one is named.
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
        """Of the folder that results stand in, without what tells models apart."""
        name = ",".join([Path(self.suite).stem, *self.tasks])
        if self.limit is not None:
            name += f",limit={self.limit}"
        if self.dtype is not None:
            name += f",{self.dtype}"
        return name + (",predictors" if self.predictors is not None else "")

    @property
    def key(self) -> str:
        """What sets one way of measuring apart from another."""
        data_dir = str(self.data_dir)
        return repr((self.suite, self.tasks, data_dir, self.limit, self.dtype, self.on))
