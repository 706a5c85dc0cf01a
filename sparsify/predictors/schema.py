"""Results of evaluating predictors."""

from __future__ import annotations

import math

from pydantic import BaseModel

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
    """

    name: str
    loss: float
    on_share: float
    ffn_bytes: float
    ffn_speedup: float
    model_speedup: float

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))


class LayerPoint(BaseModel):
    """Metrics of one layer at one threshold."""

    layer: int
    recall: float | None
    precision: float | None
    on_share: float | None


class ThresholdPoint(ReadingCost):
    """Metrics at one threshold.

    Attributes:
        threshold: A neuron is on where its score exceeds it.
        recall: Share of the neurons that fire in the masked model which are on.
        precision: Share of the neurons that are on which fire.
        static_recall: Recall of a fixed mask of the same size, with the neurons of every block that fire most often.
        loss_rise: Loss above the exact model, nats per token.
        refusal: Reason why this threshold cannot be chosen; empty if it can.
        layers: Metrics by layer.
    """

    threshold: float
    recall: float | None
    precision: float | None
    static_recall: float
    loss_rise: float
    refusal: str
    layers: list[LayerPoint]


class PredictorEvaluation(BaseModel):
    """Result of evaluating the predictors of one model.

    Attributes:
        model: Name of the model.
        predictors: Folder of the predictors.
        input: Input of the predictors: residual or normed.
        text: Description of the evaluation text.
        num_tokens: Tokens of the text.
        num_labels: Tokens that carry loss.
        max_loss_rise: The limit, nats per token.
        predictor_share: Size of the predictors as a share of the feed-forward weights that a token computes with.
        references: Dense, exact with the gate first, and perfect prediction.
        points: Metrics from the lowest threshold to the highest.
        chosen: The threshold that reads least within the limit, or None.
        verdict: Conclusion in a sentence or two.
        command: The command line.
    """

    model: str
    predictors: str
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
