"""The schema of comparison.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sparsify.errors import RunError
from sparsify.files import JsonRecord
from sparsify.metadata import read_record

COMPARISON_FILE = "comparison.json"

BaselineState = Literal["compared", "is dense", "no baseline", "not measured yet"]
Setting = str | int | float | bool | None


class ValidationPoint(JsonRecord):
    """One validation pass. Losses are nats per token."""

    tokens: int
    """Training tokens seen."""
    loss: float
    """Mean of the sources' losses, weighted by the run's own token shares."""
    sources: dict[str, float]
    """Loss of each source."""
    zeros: float | None
    """Share of exact zeros among the products of gate and up, 0 to 1."""


class SourceOfRun(JsonRecord):
    token_share: float
    """Planned share of the run's training tokens."""
    planned_tokens: int
    loss: float | None
    """Newest validation loss, nats per token; None if it was not evaluated."""
    comparable: bool
    """Whether the loss is on the same sequences as that of the other runs."""


class Baseline(JsonRecord):
    """The dense baseline of a run: same model, data, budget and optimiser, and no zeros."""

    name: str
    path: str
    tokens: int
    """The newest number of training tokens at which both were evaluated."""
    loss: float
    """The baseline's loss at that point."""
    gap: float
    """The run's loss minus the baseline's at that point, nats per token."""
    source_gaps: dict[str, float]
    """The gap of each source."""
    points: list[ValidationPoint]


class ComparedRun(JsonRecord):
    name: str
    """The shortest name that differs from the others'."""
    path: str
    settings: dict[str, Setting]
    """The settings in which the compared runs differ."""
    ffn_activation: str
    is_dense: bool
    """Whether neither its activation nor thresholds make exact zeros, and its weights are dense."""
    budget_tokens: int
    seen_tokens: int
    """Tokens trained on so far."""
    loss: float
    """The newest validation loss, that of the last point."""
    loss_comparable: bool
    """Whether the loss is a mean over the same sequences with the same shares as that of the other runs."""
    train_loss: float | None = None
    """Mean over the last tenth of the training steps, nats per token; None before the first step."""
    mean_loss: float | None
    """Unweighted mean of the sources' losses; None unless the losses of all sources of the comparison are comparable."""
    zeros: float | None
    zeros_comparable: bool
    weight_sparsity: float | None = None
    """Share of the weights of all projections that was set to zero before training; None for dense weights."""
    """Whether the zeros were counted on the same sequences as those of the other runs."""
    tokens_per_second: float | None
    """Mean speed since the last launch, including validation and saving."""
    sources: dict[str, SourceOfRun]
    baseline: Baseline | None
    baseline_state: BaselineState
    points: list[ValidationPoint]
    """Validation passes since the start of training, after an activation replacement."""

    @property
    def measured_tokens(self) -> int:
        return self.points[-1].tokens

    @property
    def finished(self) -> bool:
        """Whether the whole budget was trained and evaluated."""
        return self.measured_tokens >= self.budget_tokens


class Comparison(JsonRecord):
    """A comparison of runs. Losses are nats per token on held-out text; shares are 0 to 1."""

    schema_version: Literal[1] = 1
    runs: list[ComparedRun]
    settings: list[str]
    """Settings in which the runs differ, as SECTION.KEY."""
    sources: list[str]
    """Sources that at least one run trains on or was evaluated on."""
    swept_setting: str | None
    """The one numeric setting that differs between the runs, apart from training.seed; None if there is not exactly one."""
    notes: list[str]
    """Caveats."""
    command: str | None = None
    """The command line that made the comparison."""

    @property
    def losses_comparable(self) -> bool:
        """Whether all validation losses are comparable with each other."""
        return all(run.loss_comparable for run in self.runs)


def read_comparison(folder: Path) -> Comparison:
    """Raises RunError if there is none, or it is damaged or of another schema version."""
    path = folder / COMPARISON_FILE
    again = "Create it again with `sparsify compare RUN RUN …`."
    return read_record(path, Comparison, "a comparison of schema version 1", RunError, again)
