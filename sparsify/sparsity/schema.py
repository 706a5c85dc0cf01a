"""What a sparsity report holds: the schema of report.json."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparsify.errors import RunError

REPORT_FILE = "report.json"


class _Section(BaseModel):
    # A diverged model has a loss of NaN or infinity; JSON has neither, and null would mean "not measured".
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class LayerRow(_Section):
    """One layer, or one expert of one layer. Shares are between 0 and 1 and are None where no token was routed."""

    layer: int
    expert: int | None
    """None: all experts of the layer together, and the only row of a layer in a dense model."""
    num_tokens: int
    """Tokens that the block computed; with k experts per token, the experts of a layer sum to k times the text."""
    gate_zeros: float | None
    up_zeros: float | None
    product_zeros: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    """Percentiles over tokens of one token's share of zero products."""
    num_neurons: int
    dead_neurons: int
    always_on_neurons: int


class Stage(_Section):
    """One model on the way, measured on the same text."""

    name: str
    loss: float
    """Nats per token."""
    zeros: float | None = None


class TrajectoryPoint(_Section):
    """One measurement during training; what was not measured at that moment is None."""

    tokens: int
    """Training tokens seen."""
    loss: float | None = None
    """Validation loss, nats per token."""
    zeros: float | None = None
    layers: list[float] | None = None
    """Share of zero products of every layer."""


class Trajectory(_Section):
    """Training of the sparse model and, where there is one, of its dense control on the same tokens."""

    sparse: list[TrajectoryPoint]
    control: list[TrajectoryPoint] = Field(default_factory=list)


class SparsityReport(_Section):
    """Where and how reliably a model is sparse on one text. All losses are nats per token, all shares 0 to 1."""

    schema_version: Literal[1] = 1
    model: str
    model_type: str
    ffn_activation: str
    text: str
    """What the numbers were measured on, in words."""
    num_tokens: int
    num_labels: int
    """Predictions that the loss averages over."""
    dtype: str
    num_experts: int
    """Experts of one layer; 1 in a dense model."""
    experts_per_token: int
    gate_zeros: float
    up_zeros: float
    product_zeros: float
    num_neurons: int
    dead_neurons: int
    always_on_neurons: int
    loss: float
    layers: list[LayerRow]
    definitions: dict[str, str]
    """Term to meaning, as the page prints them."""
    stages: list[Stage] = Field(default_factory=list)
    trajectory: Trajectory | None = None
    command: str | None = None
    """The command line that made the report."""

    @property
    def layer_rows(self) -> list[LayerRow]:
        """One row a layer."""
        return [row for row in self.layers if row.expert is None]

    @property
    def expert_rows(self) -> list[LayerRow]:
        """One row an expert, layer by layer; none in a dense model."""
        return [row for row in self.layers if row.expert is not None]


def read_report(folder: Path) -> SparsityReport:
    """Reads the report that `write_report` left in a folder.

    Raises:
        RunError: If there is none, or it is damaged or of another schema version.
    """
    path = folder / REPORT_FILE
    try:
        return SparsityReport.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise RunError(
            f"{folder} holds no sparsity report ({REPORT_FILE} is missing).",
            next_step="Make one with `sparsify report RUN_OR_CHECKPOINT`.",
        ) from error
    except ValidationError as error:
        raise RunError(
            f"{path} is not a sparsity report of schema version 1: {error.errors()[0]['msg']}.",
            next_step="Make it again with `sparsify report RUN_OR_CHECKPOINT`.",
        ) from error
