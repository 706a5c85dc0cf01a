"""What judging predictors found."""

from __future__ import annotations

import math

from pydantic import BaseModel

JUDGEMENT_FILE = "judgement.json"


class Way(BaseModel):
    """One way to compute a token's feed-forward blocks.

    Attributes:
        name: In words.
        loss: Nats per token.
        on_share: Share of neurons whose weights are read.
        ffn_bytes: Share of the feed-forward weights' bytes that a token reads, predictors included.
        ffn_speedup: Predicted for the feed-forward blocks, where reading bytes is all that costs.
        model_speedup: Predicted for the whole model, with attention and head as they are.
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
    """One layer at one threshold."""

    layer: int
    recall: float | None
    precision: float | None
    on_share: float | None


class Point(Way):
    """One threshold.

    Attributes:
        threshold: A neuron is on where its score exceeds it.
        recall: Share of the neurons that fire in the masked model which are on.
        precision: Share of the neurons that are on which fire.
        static_recall: Recall of switching on as many neurons of every block, always the same: those that fire most often.
        loss_rise: Against the exact model, nats per token.
        refusal: Why this threshold cannot be chosen; empty where it can.
        layers: Layer by layer.
    """

    threshold: float
    recall: float | None
    precision: float | None
    static_recall: float
    loss_rise: float
    refusal: str
    layers: list[LayerPoint]


class Judgement(BaseModel):
    """Everything that judging found.

    Attributes:
        model: Name of the model.
        predictors: Folder of the predictors.
        input: What the predictors get.
        text: What they were judged on.
        num_tokens: Tokens of it.
        num_labels: Tokens that carry loss.
        max_loss_rise: The limit, nats per token.
        predictor_share: Size of the predictors as a share of the feed-forward weights that a token computes with.
        ways: Dense count, exact gate first, and perfect prediction.
        points: From the lowest threshold to the highest.
        chosen: The threshold that reads least within the limit; None when none may be chosen.
        verdict: What to make of it, in a sentence or two.
        command: What was typed.
    """

    model: str
    predictors: str
    input: str
    text: str
    num_tokens: int
    num_labels: int
    max_loss_rise: float
    predictor_share: float
    ways: list[Way]
    points: list[Point]
    chosen: float | None
    verdict: str
    command: str = ""

    @property
    def chosen_point(self) -> Point | None:
        """The point at the chosen threshold."""
        return next((point for point in self.points if point.threshold == self.chosen), None)
