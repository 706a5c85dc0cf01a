"""The schema of a sparsity report (report.json)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from sparsify.errors import RunError
from sparsify.files import JsonRecord
from sparsify.metadata import read_record
from sparsify.runs.history import Stage, Trajectory

REPORT_FILE = "report.json"


class LayerRow(JsonRecord):
    """One layer, or one expert of one layer. Shares are between 0 and 1, and None if no token was routed."""

    layer: int
    expert: int | None
    """None for all experts of the layer, which is the only row of a layer in a dense model."""
    num_tokens: int
    """Tokens that the block computed; with k experts per token, the experts of a layer sum to k times the text's tokens."""
    gate_zeros: float | None
    up_zeros: float | None
    product_zeros: float | None
    p5: float | None
    p50: float | None
    p95: float | None
    """Percentiles over tokens of one token's share of zero products."""
    gate_only_zeros: float | None
    up_only_zeros: float | None
    both_zeros: float | None
    """Shares of products that are zero because of one factor or of both; with `underflow_zeros` they sum to
    `product_zeros`."""
    underflow_zeros: float | None
    """Zero products of two factors that are not zero."""
    num_neurons: int
    dead_neurons: int
    always_on_neurons: int
    firing_rate_bound: float | None
    """95% bound on a dead neuron's firing rate, and on the share of tokens on which an always-on neuron does not fire."""
    site_zeros: dict[str, float] = Field(default_factory=dict)
    """Share of exact zeros at each masked input of the layer's projections, and of dropped groups (COUNTED_SITES); empty in the rows of
    experts."""


GATE_BINS = 20
"""Bins of sigmoid(score), of equal width from 0 to 1."""


class RouterRow(JsonRecord):
    """What one layer's router of groups did on the measured text, all experts together. Shares are of groups over tokens."""

    layer: int
    active: float
    """Share of groups that were on."""
    undecided: float
    """Share whose sigmoid(score) was within 0.1 of the threshold; 0 where groups are chosen by rank."""
    empty_tokens: float
    """Share of tokens (in a mixture: of tokens of an expert) for which no group was on."""
    gates: list[float]
    """Share whose sigmoid(score) lies in each of GATE_BINS bins."""


class SourceRow(JsonRecord):
    """One source of the text. Shares are between 0 and 1."""

    source: str
    num_tokens: int
    num_labels: int
    loss: float | None
    """Nats per token; None if no position has a label."""
    gate_zeros: float
    up_zeros: float
    product_zeros: float
    layers: list[float]
    """Share of zero products of every layer."""


class PositionRow(JsonRecord):
    """Tokens in a range of positions in their document, or in the sequence if the document continues from the previous one."""

    first: int
    last: int | None
    """None for no limit."""
    num_tokens: int
    product_zeros: float


class ChunkRow(JsonRecord):
    """Neurons that fire on at least one of several tokens, as a share of all neurons (of all experts)."""

    num_tokens: int
    num_chunks: int
    consecutive: float | None
    """Mean over chunks of that many consecutive tokens of one document; None if there are no such chunks."""
    unrelated: float | None
    """Mean over every choice of that many different tokens of the text."""


class EngineStatistics(JsonRecord):
    """What an inference engine that skips neurons can exploit. All are shares between 0 and 1."""

    chunks: list[ChunkRow]
    reuse: list[float | None]
    """Firing neurons that also fired on at least one of the last 1, 2, … 5 tokens."""
    coactivation_gap: float | None
    independent_coactivation_gap: float | None
    """The gap of independent neurons with the same firing rates."""
    sampled_neurons: int
    """Neurons of each expert whose pairs were counted."""
    gate_first_ffn_bytes: float
    perfect_predictor_ffn_bytes: float
    """Weights of the computed blocks that one token reads."""


class ActivePart(JsonRecord):
    """Parameters of one part of the model: in total, and needed by one token."""

    part: str
    total: int
    perfect_predictor: int
    gate_first: int


class ActiveParameters(JsonRecord):
    """Parameters that one token needs, counted in two ways."""

    parts: list[ActivePart]

    @property
    def total(self) -> int:
        return sum(part.total for part in self.parts)

    @property
    def perfect_predictor(self) -> int:
        return sum(part.perfect_predictor for part in self.parts)

    @property
    def gate_first(self) -> int:
        return sum(part.gate_first for part in self.parts)

    @property
    def embeddings(self) -> int:
        return sum(part.total for part in self.parts if part.part == "embeddings")


class HiddenRoutingRow(JsonRecord):
    """Where the tokens of one router of a mixture of hidden dimensions went."""

    layer: int
    block: Literal["attention", "ffn"]
    load: list[float]
    """Share of the router's choices that fell on each specialised sub-dimension; sums to 1."""
    entropy: float
    """Mean entropy over them, in nats."""

    @property
    def unevenness(self) -> float:
        """Largest load divided by the mean; 1 when all are equal."""
        return max(self.load) * len(self.load)


class HiddenRouting(JsonRecord):
    """Sub-dimensions of a model that routes tokens to them."""

    sub_dimensions: int
    shared: int
    active: int
    rows: list[HiddenRoutingRow]


class MatrixRow(JsonRecord):
    layer: int
    projection: str
    """Such as `gate_proj`; of all experts of the layer."""
    zeros: float


class WeightZeros(JsonRecord):
    """Weights that are exactly zero, of a model that was made so. Bytes are what a token reads of the linear projections in bf16."""

    method: str
    pattern: str
    sparsity: float
    """Share that the method was to set to zero."""
    zeros: float
    """Share that is zero."""
    matrices: list[MatrixRow]
    dense_bytes: int
    activation_bytes: int
    """Without the weights that zeros of activations spare."""
    weight_bytes: int
    """With one bit for each weight and two bytes for each that is not zero."""
    both_bytes: int
    """That, of the weights that zeros of activations leave."""


class IntegerWeights(JsonRecord):
    """Of a model whose projections are integers (`config.quantisation`). Bytes are what a token reads of the linear projections."""

    words: str
    weight_bits: int
    activation_bits: int
    dense_bytes: int
    """If they were in bf16."""
    activation_bytes: int
    """That, without the weights that zeros of activations spare."""
    integer_bytes: int
    """Codes and scales."""
    both_bytes: int
    """That, of the weights that zeros of activations leave."""


class PublishedActive(JsonRecord):
    name: str
    claimed: int
    zeros: float
    perfect_predictor: int
    gate_first: int
    zeros_of_claim: float
    """Zeros at which a perfect predictor would need the published number."""


class CettLayer(JsonRecord):
    """One layer with its threshold on the norm of a neuron's output, on the inputs of the unmodified model."""

    threshold: float
    cett: float
    sparsity: float


class CettPoint(JsonRecord):
    """Thresholds of every layer at one target error."""

    target: float
    sparsity: float
    """Mean of the layers' sparsities."""
    loss: float
    """Loss with the thresholds applied in all layers at once; nats per token."""
    edited_sparsity: float
    """Share of zeros with the thresholds applied in all layers at once."""
    layers: list[CettLayer]


class PplPoint(JsonRecord):
    """Highest CETT at which the perplexity increases by at most `percent` %."""

    percent: int
    cett: float
    sparsity: float
    loss: float
    is_limit: bool
    """Whether the perplexity did not increase that much at the highest CETT tried."""


class SharePoint(JsonRecord):
    """Loss with a share of activations dropped; a model with more exact zeros than that is unchanged."""

    share: float
    sparsity: float
    """Share of zeros with the activations dropped."""
    loss: float


class Curves(JsonRecord):
    """Loss when small activations are dropped, on a part of the text."""

    num_tokens: int
    num_labels: int
    loss: float
    """Loss of the unmodified model."""
    cett: list[CettPoint]
    ppl: list[PplPoint]
    top_k: list[SharePoint]
    magnitude: list[SharePoint]


class PairedDifference(JsonRecord):
    """Loss of the report's model minus the other's, nats per token, with a 95% interval over sequences."""

    value: float
    low: float | None
    high: float | None
    """None for a single sequence."""
    num_sequences: int


class Against(JsonRecord):
    model: str
    ffn_activation: str
    loss: float
    product_zeros: float
    layers: list[float]
    """Share of zero products of every layer."""
    site_zeros: dict[str, float] = Field(default_factory=dict)
    weight_density: float | None = None
    active_parameters: ActiveParameters
    weight_zeros: WeightZeros | None = None
    integers: IntegerWeights | None = None
    curves: Curves | None = None
    difference: PairedDifference | None = None


class ScalingPoint(JsonRecord):
    tokens: int
    active: float
    """Activation ratio, 1 - zeros."""
    low: float
    high: float
    """Bounds of the confidence band of the law, not of a single measurement."""


class ScalingFit(JsonRecord):
    """Sparsing Law fitted to the checkpoints of this run; D in billions of training tokens."""

    family: Literal["relu", "silu"]
    """relu: exp(-c·D^alpha + b) + limit; silu: -c / D^alpha + limit."""
    num_points: int
    alpha: float
    c: float
    b: float | None
    limit: float
    """Activation ratio after unlimited training."""
    residual: float
    """Standard deviation of the checkpoints around the law."""
    confidence: float
    predicted: list[ScalingPoint]
    """At 1, 2, 5 and 10 times the tokens seen."""
    band: list[ScalingPoint]


class SparsityReport(JsonRecord):
    """Sparsity of a model on one text. Losses are nats per token; shares are 0 to 1."""

    schema_version: Literal[2] = 2

    @model_validator(mode="before")
    @classmethod
    def _take_old_thresholds(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and "ffn_thresholds" in fields:
            fields = dict(fields)
            if fields.pop("ffn_thresholds") == "neuron":
                fields["masks"] = {"inter": "channel"}
        return fields

    model: str
    model_type: str
    ffn_activation: str
    masks: dict[str, str] = Field(default_factory=dict)
    """Sites that the model itself masks: what does not exceed a threshold there is an exact zero too. `layer` where the
    threshold is the layer's, `channel` where every neuron has its own."""
    text: str
    """Description of the text that was measured."""
    num_tokens: int
    num_labels: int
    """Number of predictions that the loss averages over."""
    dtype: str
    num_experts: int
    """Experts of one layer; 1 in a dense model."""
    experts_per_token: int
    gate_zeros: float
    up_zeros: float
    product_zeros: float
    site_zeros: dict[str, float] = Field(default_factory=dict)
    """Share of exact zeros at each of COUNTED_SITES that the model masks, over all layers. The masked
    sites `gate` and `inter` are `gate_zeros` and `product_zeros`."""
    weight_density: float | None = None
    """Share of the weights of the linear projections that a token reads (methods/density.py), from the zeros of each layer; None in
    reports of older versions."""
    num_neurons: int
    dead_neurons: int
    always_on_neurons: int
    loss: float
    layers: list[LayerRow]
    sources: list[SourceRow]
    positions: list[PositionRow]
    firing_curves: list[list[float]]
    """Firing rates of each layer's neurons (of all experts) in descending order, at evenly spaced neurons."""
    engine: EngineStatistics
    active_parameters: ActiveParameters
    hidden_routing: HiddenRouting | None = None
    """None in models whose tokens all use the same part of the hidden size."""
    weight_zeros: WeightZeros | None = None
    """None for dense weights."""
    integers: IntegerWeights | None = None
    """None for weights that are numbers."""
    definitions: dict[str, str]
    """Term to definition."""
    curves: Curves | None = None
    against: Against | None = None
    stages: list[Stage] = Field(default_factory=list)
    trajectory: Trajectory | None = None
    scaling: ScalingFit | None = None
    routers: list[RouterRow] = Field(default_factory=list)
    """Of each layer, in a model that chooses groups of neurons by routers."""
    command: str | None = None
    """The command line that created the report."""

    @property
    def dead_rate_bound(self) -> float:
        """The weakest bound of all layers and experts on the firing rate of their dead neurons."""
        return max((row.firing_rate_bound or 0.0 for row in self.layers), default=0.0)

    @property
    def layer_rows(self) -> list[LayerRow]:
        return [row for row in self.layers if row.expert is None]

    @property
    def expert_rows(self) -> list[LayerRow]:
        return [row for row in self.layers if row.expert is not None]


def read_report(folder: Path) -> SparsityReport:
    """Raises RunError if there is no report, or it is damaged or of another schema version."""
    path = folder / REPORT_FILE
    if not path.exists():
        raise RunError(
            f"{folder} does not hold a sparsity report ({REPORT_FILE} is missing).",
            next_step="Create one with `sparsify report RUN_OR_CHECKPOINT`.",
        )
    again = "Create it again with `sparsify report RUN_OR_CHECKPOINT`."
    return read_record(path, SparsityReport, "a sparsity report of schema version 2", RunError, again)
