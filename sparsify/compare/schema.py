"""What a comparison holds: the schema of comparison.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from sparsify.errors import RunError

COMPARISON_FILE = "comparison.json"

BaselineState = Literal["compared", "is dense", "no baseline", "not measured yet"]
Setting = str | int | float | bool | None


class _Section(BaseModel):
    # A diverged run has a loss of NaN or infinity; JSON has neither, and null would mean "not measured".
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Point(_Section):
    """One validation pass. Losses are nats per token."""

    tokens: int
    """Training tokens seen."""
    loss: float
    """Mean of the sources' losses, weighted by the run's own token shares."""
    sources: dict[str, float]
    """Loss of each source."""
    zeros: float | None
    """Share of exact zeros among the products of gate and up, 0 to 1."""


class SourceOfRun(_Section):
    """One source in one run."""

    token_share: float
    """Planned share of the run's training tokens."""
    planned_tokens: int
    loss: float | None
    """Newest validation loss, nats per token; None if it was not measured."""
    comparable: bool
    """Whether the other runs measured this source on the same sequences."""


class Baseline(_Section):
    """The dense baseline of a run: same model, data, budget and optimiser, and no zeros."""

    name: str
    path: str
    tokens: int
    """The newest number of training tokens at which both were measured."""
    loss: float
    """The baseline's loss there."""
    gap: float
    """The run's loss there minus the baseline's, nats per token."""
    source_gaps: dict[str, float]
    """The same for each source."""
    points: list[Point]


class ComparedRun(_Section):
    """One run: a row of the table."""

    name: str
    """The shortest name that sets it apart from the others."""
    path: str
    settings: dict[str, Setting]
    """The settings in which the compared runs differ."""
    ffn_activation: str
    is_dense: bool
    """Whether neither its activation nor thresholds make exact zeros."""
    budget_tokens: int
    seen_tokens: int
    """Tokens trained on so far."""
    loss: float
    """The newest validation loss; its tokens are those of the last point."""
    loss_comparable: bool
    """Whether the other runs' losses are means over the same sequences with the same shares."""
    mean_loss: float | None
    """Mean of the sources' losses, each counting the same; None unless all sources of the comparison were measured, on
    the sequences of the others."""
    zeros: float | None
    zeros_comparable: bool
    """Whether the other runs' zeros were counted on the same sequences."""
    tokens_per_second: float | None
    """Mean speed since the run was last launched, validation and saving included."""
    sources: dict[str, SourceOfRun]
    baseline: Baseline | None
    baseline_state: BaselineState
    points: list[Point]
    """Validation passes from where training starts, after an activation replacement."""

    @property
    def measured_tokens(self) -> int:
        """Training tokens that the newest losses belong to."""
        return self.points[-1].tokens

    @property
    def finished(self) -> bool:
        """Whether the whole budget was trained and measured."""
        return self.measured_tokens >= self.budget_tokens


class Comparison(_Section):
    """Runs side by side. All losses are nats per token on held-out text, all shares 0 to 1."""

    schema_version: Literal[1] = 1
    runs: list[ComparedRun]
    settings: list[str]
    """Settings in which the runs differ, as SECTION.KEY."""
    sources: list[str]
    """Sources that at least one run trains on or was measured on."""
    swept_setting: str | None
    """The one setting that differs, if it is one and a number; training.seed may differ beside it."""
    notes: list[str]
    """What must be known before two numbers are compared, in words."""
    command: str | None = None
    """The command line that made the comparison."""

    @property
    def losses_comparable(self) -> bool:
        """Whether the runs' validation losses may all be compared with each other."""
        return all(run.loss_comparable for run in self.runs)


def read_comparison(folder: Path) -> Comparison:
    """Reads the comparison that `write_comparison` left in a folder.

    Raises:
        RunError: If there is none, or it is damaged or of another schema version.
    """
    path = folder / COMPARISON_FILE
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{path} is not a comparison of schema version 1: {str(error).splitlines()[0]}.",
            next_step="Make it again with `sparsify compare RUN RUN …`.",
        ) from error
