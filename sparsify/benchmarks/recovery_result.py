"""What the recovery benchmark found: for each arm its runs, its gap to the dense control, and what decides its speed."""

from __future__ import annotations

from statistics import fmean

from pydantic import BaseModel, ConfigDict, computed_field

from sparsify.errors import RunError
from sparsify.training.history import read_lines
from sparsify.training.run_folder import RunFolder

DENSE = "dense"
"""The arm that all others are held against."""


class RecoveryPoint(BaseModel):
    """One validation of a run.

    Attributes:
        tokens: Training tokens seen.
        loss: Mean of the sources' losses by token share, nats per token.
        zeros: Share of products that are exactly zero.
        gate_zeros: Share of the gate's factors that are.
        annealed_share: How much of the sparse activation was in force; 1 for all of it.
    """

    model_config = ConfigDict(frozen=True)

    tokens: int
    loss: float
    zeros: float
    gate_zeros: float
    annealed_share: float

    @computed_field
    @property
    def gate_first_bytes(self) -> float:
        """Share of the feed-forward weights that an exact kernel reads for one token: all of the gate, then rows of up where
        the gate is not zero, then columns of down where the product is not. The three are of the same size.
        """
        return (1 + (1 - self.gate_zeros) + (1 - self.zeros)) / 3

    @computed_field
    @property
    def predicted_bytes(self) -> float:
        """Share that a kernel with a perfect predictor reads, without the predictor's own weights."""
        return 1 - self.zeros


class RecoveryRun(BaseModel):
    """One finished run of an arm."""

    model_config = ConfigDict(frozen=True)

    arm: str
    seed: int
    peak_learning_rate: float
    path: str
    points: list[RecoveryPoint]
    """From where its training starts: right after the swap, or the dense base where the swap is annealed."""

    @property
    def last(self) -> RecoveryPoint:
        return self.points[-1]


class RecoveryArm(BaseModel):
    """An arm with the learning rate that its own search chose.

    Attributes:
        name: Its recipe in `recipes/recovery/`.
        searched: Final loss of the first seed by peak learning rate.
        runs: One a seed, with the best of them.
        gaps: For each seed, its final loss minus that of the dense control with the same seed.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    searched: dict[float, float]
    runs: list[RecoveryRun]
    gaps: list[float]

    @property
    def peak_learning_rate(self) -> float:
        return self.runs[0].peak_learning_rate

    @computed_field
    @property
    def gap(self) -> float:
        """Mean of the gaps, nats per token."""
        return fmean(self.gaps)

    def mean(self, figure: str) -> float:
        """Mean over seeds of one number of the last point."""
        return fmean(getattr(run.last, figure) for run in self.runs)

    def at_edge(self) -> bool:
        """Whether the best rate is the lowest or highest that was tried: then a better one may lie outside."""
        return len(self.searched) > 1 and self.peak_learning_rate in (
            min(self.searched),
            max(self.searched),
        )


class Recovery(BaseModel):
    """The benchmark's result."""

    model_config = ConfigDict(frozen=True)

    budget_tokens: int
    seeds: list[int]
    arms: list[RecoveryArm]

    @property
    def dense(self) -> RecoveryArm:
        return next(arm for arm in self.arms if arm.name == DENSE)


def read_run(run: RunFolder, arm: str) -> RecoveryRun:
    """Reads a finished run's validations.

    Raises:
        RunError: If it was not measured to its end.
    """
    recipe = run.load_recipe()
    annealed = recipe.swap.anneal_token_share > 0
    records = read_lines(run.sparsity)
    losses = {
        (line["tokens"], line["label"]): line["loss"]
        for line in read_lines(run.metrics)
        if line.get("kind") == "validation"
    }
    labels = {line["label"] for line in records}
    start = "after_swap" if "after_swap" in labels and not annealed else "base"
    points = [
        RecoveryPoint(
            tokens=line["tokens"],
            loss=losses[line["tokens"], line["label"]],
            zeros=line["zeros"],
            gate_zeros=line["gate_zeros"],
            annealed_share=0.0
            if annealed and not line["tokens"]
            else line.get("annealed_share", 1),
        )
        for line in records
        if line["label"] in (start, "annealing", "training")
    ]
    if not points or points[-1].tokens != recipe.num_steps * recipe.step_tokens:
        raise RunError(
            f"{run.path} was not measured at the end of its budget.",
            next_step="Run the same benchmark again: it goes on with this run.",
        )
    return RecoveryRun(
        arm=arm,
        seed=recipe.training.seed,
        peak_learning_rate=recipe.optimizer.peak_learning_rate,
        path=str(run.path),
        points=points,
    )
