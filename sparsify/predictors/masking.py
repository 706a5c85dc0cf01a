"""A model whose neurons are switched off where the predictors say so, as an engine runs it."""

from __future__ import annotations

import torch

from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.predictors import Block, Predictors
from sparsify.predictors.scores import ScoreHistogram


class Mask:
    """Editor of a SparsityProbe: switches off what is not predicted, and counts hits and misses.

    Every token is masked, those of the prompt too, as PowerInfer does it.

    Args:
        predictors: On the model's device.
        inputs: Entered before the probe, with the predictors' kind of input.
        threshold: Instead of the predictors' own.
    """

    def __init__(
        self, predictors: Predictors, inputs: BlockInputs, threshold: float | None = None
    ) -> None:
        self._predictors, self._inputs = predictors, inputs
        self._threshold = predictors.facts.threshold if threshold is None else threshold
        self.counts: dict[Block, torch.Tensor] = {}
        """Neurons that fire, those of them that are on, neurons that are on, and values; int64 [4] of every block."""

    def __call__(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        """The activations, 0 where the neuron is predicted off, [rows, neurons]."""
        scores = self._predictors.blocks[layer, expert].scores(self._inputs.rows(expert))
        on, fired = scores > self._threshold, product != 0
        counted = [fired.sum(), (fired & on).sum(), on.sum(), torch.tensor(on.numel())]
        counts = torch.stack([count.cpu() for count in counted])
        self.counts[layer, expert] = self.counts.get((layer, expert), 0) + counts
        return product * on


class ScoreReader:
    """Editor that changes nothing and counts the scores of all blocks together."""

    def __init__(self, predictors: Predictors, inputs: BlockInputs) -> None:
        self._predictors, self._inputs = predictors, inputs
        self.histogram = ScoreHistogram()

    def __call__(self, layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        """The activations as they are."""
        scores = self._predictors.blocks[layer, expert].scores(self._inputs.rows(expert))
        self.histogram.add(scores, product != 0)
        return product
