"""Runs a model with predicted masks, as an inference engine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sparsify.predictors.format import Block, Predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.scores import FiringScores
from sparsify.sparsity.probe import Tokens


class PredictorMask:
    """Mask of a SparsityProbe: drops neurons that are not predicted, and counts hits and misses.

    Every token is masked, those of the prompt too, as PowerInfer does it. As an observer of the same probe it counts
    only the tokens that the probe counts, so no padding.

    Args:
        inputs: Block inputs of the predictors' kind, entered before the probe.
        threshold: Instead of the predictors' own.
        at_threshold: Whether a score equal to the threshold switches a neuron on.
    """

    def __init__(
        self,
        predictors: Predictors,
        inputs: BlockInputs,
        threshold: float | None = None,
        *,
        at_threshold: bool = False,
    ) -> None:
        self._predictors, self._inputs = predictors, inputs
        self._threshold = predictors.facts.threshold if threshold is None else threshold
        self._above = torch.ge if at_threshold else torch.gt
        self.fired: Callable[[torch.Tensor], torch.Tensor] = lambda product: product != 0
        """Which neurons fire, bool [rows, neurons], from their activations; an engine may compute more than fire."""
        self._counted: torch.Tensor | None = None
        self.largest = 0.0
        """The largest magnitude of an activation that is on."""
        self.counts: dict[Block, torch.Tensor] = {}
        """Neurons that fire, those of them that are on, neurons that are on, and values; int64 [4] of every block."""

    def begin(self, tokens: Tokens) -> None:
        self._counted = tokens.counted.flatten()

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        """Does nothing: `keep` counts, while the activations are not masked yet."""

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        """Which neurons are predicted to fire, bool [rows, neurons]."""
        scores = self._predictors.blocks[layer, expert].scores(self._inputs.rows(expert))
        predicted = on = self._above(scores, self._threshold)
        fired = self.fired(product)
        if product.numel():
            self.largest = max(self.largest, float((product * on).abs().max()))
        if self._counted is not None:
            keep = self._inputs.of_expert(self._counted.to(on.device), expert)
            on, fired = on[keep], fired[keep]
        counted = [fired.sum(), (fired & on).sum(), on.sum(), torch.tensor(on.numel())]
        counts = torch.stack([count.cpu() for count in counted])
        self.counts[layer, expert] = self.counts.get((layer, expert), 0) + counts
        return predicted


class ScoreReader:
    """Mask that keeps everything and counts the scores of all blocks in one histogram."""

    def __init__(self, predictors: Predictors, inputs: BlockInputs) -> None:
        self._predictors, self._inputs = predictors, inputs
        self.histogram = FiringScores()

    def keep(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        """True everywhere, [rows, neurons]."""
        scores = self._predictors.blocks[layer, expert].scores(self._inputs.rows(expert))
        self.histogram.add(scores, product != 0)
        return torch.ones_like(product, dtype=torch.bool)
