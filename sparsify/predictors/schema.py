"""Results of evaluating predictors."""

from __future__ import annotations

import math

from pydantic import BaseModel

from sparsify.predictors.engines import OWN

EVALUATION_FILE = "evaluation.json"


class ReadingCost(BaseModel):
    """Loss and memory traffic of one way to compute the feed-forward blocks.

    Attributes:
        name: Name in tables and plots.
        loss: Nats per token.
        on_share: Share of neurons whose weights are read.
        ffn_bytes: Share of the feed-forward weights' bytes that a token reads, predictors included.
        ffn_speedup: Predicted speed-up of the feed-forward blocks over dense, if time is proportional to bytes read.
        model_speedup: Predicted speed-up of the whole model, with dense attention and head.
        recall: Share of the neurons that fire which are on, where something other than their own weights chooses them.
        precision: Share of the neurons that are on which fire.
    """

    name: str
    loss: float
    on_share: float
    ffn_bytes: float
    ffn_speedup: float
    model_speedup: float
    recall: float | None = None
    precision: float | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class LayerPoint(BaseModel):
    layer: int
    recall: float | None
    precision: float | None
    on_share: float | None


class ThresholdPoint(ReadingCost):
    """Metrics at one threshold.

    Attributes:
        static_recall: Recall of a fixed mask of the same size, with the neurons of every block that fire most often.
        loss_rise: Loss above the exact model, nats per token.
        refusal: Reason why this threshold cannot be chosen; empty if it can.
    """

    threshold: float
    static_recall: float
    loss_rise: float
    refusal: str
    layers: list[LayerPoint]


class PredictorEvaluation(BaseModel):
    """Result of evaluating the predictors of one model.

    Attributes:
        engine: The engine whose arithmetic was measured, a key of ENGINES.
        dropped_thresholds: Whether the model stores thresholds that this engine does not apply.
        input: Input of the predictors: residual or normed.
        num_labels: Tokens that carry loss.
        max_loss_rise: The limit, nats per token.
        predictor_share: Size of the predictors as a share of the feed-forward weights that a token computes with.
        references: Dense, exact with the gate first if the engine can do that, and perfect prediction.
        points: Metrics from the lowest threshold to the highest.
        chosen: The threshold that reads least within the limit, or None.
    """

    model: str
    predictors: str
    engine: str = OWN
    dropped_thresholds: bool = False
    input: str
    text: str
    num_tokens: int
    num_labels: int
    max_loss_rise: float
    predictor_share: float
    references: list[ReadingCost]
    points: list[ThresholdPoint]
    chosen: float | None
    verdict: str
    command: str = ""

    @property
    def chosen_point(self) -> ThresholdPoint | None:
        return next((point for point in self.points if point.threshold == self.chosen), None)
