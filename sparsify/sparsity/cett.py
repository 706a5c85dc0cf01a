"""CETT, the cumulative error of tail truncation (ReLU² Wins, arXiv 2402.03804), and the thresholds that reach a given error.

Neuron i adds n_i = h_i · W_down[:, i] to a block's output. With the neurons D whose norm does not exceed a threshold left out,
CETT = ‖Σ_D n_i‖ / ‖Σ n_i‖, averaged over tokens, and the sparsity is |D| divided by the number of neurons. A threshold belongs to
a layer. Every layer is judged on the inputs that it has in the untouched model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsify.models import SparseModel
from sparsify.sparsity.magnitudes import MagnitudeHistogram, down_norms, down_weight
from sparsify.sparsity.probe import PIECE_ROWS, SparsityProbe, Tokens

CETT_TARGETS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
CETT_TOLERANCE = 0.002
"""And no less than 2% of the target."""
MAX_ROUNDS = 4
GRID_SHARES = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985, 0.995)
"""Shares of a layer's non-zero values at which the search looks first."""

Batch = dict[str, torch.Tensor]


class Truncation(NamedTuple):
    """What one threshold does to one layer."""

    threshold: float
    cett: float
    sparsity: float


class CettObserver:
    """Measures CETT at some thresholds of every layer during passes of a SparsityProbe.

    Args:
        norms: What `down_norms` gives for the model.
        thresholds: Of every layer, [layers][any number].
    """

    def __init__(
        self, norms: Sequence[torch.Tensor], thresholds: Sequence[Sequence[float]]
    ) -> None:
        self._norms, self._thresholds = norms, thresholds
        self._errors = [[0.0] * len(layer) for layer in thresholds]
        self._dropped = [[0] * len(layer) for layer in thresholds]
        self._rows = [0] * len(thresholds)

    def begin(self, tokens: Tokens) -> None:
        """Nothing depends on the tokens."""

    def add(
        self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor
    ) -> None:
        """Adds the errors of one block's tokens; experts are judged by their own outputs."""
        weight = down_weight(block, expert)
        self._rows[layer] += len(product)
        for rows in product.split(PIECE_ROWS):
            self._add_rows(layer, rows, weight, self._norms[layer][expert])

    def _add_rows(
        self, layer: int, product: torch.Tensor, weight: torch.Tensor, down: torch.Tensor
    ) -> None:
        whole = nn.functional.linear(product, weight).float().norm(dim=-1)
        norms = product.float().abs() * down
        for index, threshold in enumerate(self._thresholds[layer]):
            dropped = norms <= threshold
            error = nn.functional.linear(product * dropped, weight).float().norm(dim=-1)
            # A block whose output is zero loses nothing.
            relative = torch.where(whole > 0, error / whole, 0.0)
            self._errors[layer][index] += float(relative.double().sum())
            self._dropped[layer][index] += int(dropped.sum())

    def truncations(self, num_neurons: int) -> list[list[Truncation]]:
        """Error and sparsity of each threshold, [layers][thresholds]; layers that saw no token have none."""
        return [
            [
                Truncation(threshold, error / rows, dropped / (rows * num_neurons))
                for threshold, error, dropped in zip(*layer, strict=True)
            ]
            if rows
            else []
            for rows, *layer in zip(
                self._rows, self._thresholds, self._errors, self._dropped, strict=True
            )
        ]


class CettSearch:
    """Finds the threshold of every layer that reaches a target error.

    The first pass looks at a grid of thresholds; every further one looks where the line through the nearest known thresholds
    on both sides of a target meets it. All layers and targets share the passes.

    Args:
        model: A sparse model in evaluation mode.
        batches: The text.
        outputs: Histogram of the norms ‖n_i‖ on that text.
    """

    def __init__(
        self, model: SparseModel, batches: Sequence[Batch], outputs: MagnitudeHistogram
    ) -> None:
        self._model, self._batches = model, batches
        self._norms = down_norms(model)
        num_layers = len(self._norms)
        grid = [
            [0.0, *(outputs.threshold(layer, share, of_nonzero=True) for share in GRID_SHARES)]
            for layer in range(num_layers)
        ]
        self._known: list[list[Truncation]] = [[] for _ in range(num_layers)]
        self._look_at([sorted(set(layer)) for layer in grid])

    def search(self, targets: Sequence[float]) -> None:
        """Looks until every layer has a threshold within CETT_TOLERANCE of each target, or MAX_ROUNDS passes are done."""
        for _ in range(MAX_ROUNDS):
            asked = [
                [
                    guess.threshold
                    for target in targets
                    if abs(self.nearest(layer, target).cett - target)
                    > max(CETT_TOLERANCE, 0.02 * target)
                    and (guess := self.estimate(layer, target)).threshold
                    not in [known.threshold for known in self._known[layer]]
                ]
                for layer in range(len(self._known))
            ]
            if not any(asked):
                return
            self._look_at(asked)

    def nearest(self, layer: int, target: float) -> Truncation:
        """The known threshold whose error is nearest to the target; of equals the largest, which drops most."""
        return min(
            self._known[layer],
            key=lambda known: (abs(known.cett - target), -known.threshold),
            default=Truncation(0.0, 0.0, math.nan),
        )

    def estimate(self, layer: int, target: float) -> Truncation:
        """Threshold for a target, interpolated between the known ones on both sides of it."""
        known = self._known[layer]
        below = [point for point in known if point.cett <= target]
        if not below:
            return self.nearest(layer, target)
        low = max(below)
        above = [point for point in known if point.threshold > low.threshold]
        if not above:
            return low
        high = min(above)
        part = (target - low.cett) / max(high.cett - low.cett, 1e-12)
        if low.threshold > 0:
            threshold = low.threshold * (high.threshold / low.threshold) ** part
        else:
            threshold = high.threshold * part
        sparsity = low.sparsity + part * (high.sparsity - low.sparsity)
        return Truncation(threshold, target, sparsity)

    def thresholds(self, target: float) -> list[float]:
        """One interpolated threshold for each layer."""
        return [self.estimate(layer, target).threshold for layer in range(len(self._known))]

    @torch.no_grad()
    def _look_at(self, thresholds: Sequence[Sequence[float]]) -> None:
        observer = CettObserver(self._norms, thresholds)
        with SparsityProbe(self._model, observer):
            for batch in self._batches:
                # The decoder alone: the head's logits are not needed.
                self._model.model(
                    input_ids=batch["input_ids"],
                    position_ids=batch["position_ids"],
                    use_cache=False,
                )
        found = observer.truncations(self._model.config.intermediate_size)
        for known, new in zip(self._known, found, strict=True):
            known.extend(new)
