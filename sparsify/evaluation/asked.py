"""What is asked of a model, by a command or by the run that trains it, and under which name its results stand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsify.evaluation.in_training import data_dir_of
from sparsify.recipe_evaluation import EvalSection


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
