"""How sparse a model could be: what its loss does when small activations are dropped.

Three rules, each with its published definition: thresholds at a target CETT, the |h| of highest rank of every token
(TurboSparse, arXiv 2406.05955, table 3), and a fixed threshold on |h| in every layer. CETT-PPL-p% (Sparsing Law, arXiv 2411.02335)
is the sparsity at the CETT where the perplexity has risen by p%.

CETT, the cumulative error of tail truncation (ReLU² Wins, arXiv 2402.03804), and the thresholds that reach a given error.

Neuron i adds n_i = h_i · W_down[:, i] to a block's output. With the neurons D whose norm does not exceed a threshold dropped,
CETT = ‖Σ_D n_i‖ / ‖Σ n_i‖, averaged over tokens, and the sparsity is |D| divided by the number of neurons. A threshold belongs to
a layer. Every layer is evaluated on the inputs that it has in the untouched model.

Activation magnitudes and output norms of every layer, counted by a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsify.methods.base import TokenMask
from sparsify.methods.histogram import Bins, Histogram
from sparsify.methods.token_masks import CettMask, LayerThresholdMask, TopKMask
from sparsify.models import SparseModel
from sparsify.models.masking import num_experts, num_neurons
from sparsify.sparsity.probe import PIECE_ROWS, SparsityProbe, Tokens
from sparsify.sparsity.schema import CettLayer, CettPoint, Curves, PplPoint, SharePoint

MAGNITUDE_BINS = Bins("log2", lowest=-48, per_unit=64, num_bins=80 * 64)
"""A bin is 1.1% wide; 2^-48 and less counts as zero."""


class MagnitudeObserver:
    """Gathers two histograms from a SparsityProbe: of |h|, and of the norm of what a neuron adds to the block's output."""

    def __init__(self, model: SparseModel) -> None:
        num_layers = len(model.model.layers)
        self.activations, self.outputs = (Histogram(MAGNITUDE_BINS, num_layers) for _ in range(2))
        self._norms = down_norms(model)

    def begin(self, tokens: Tokens) -> None:
        """Nothing depends on the tokens."""

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        for rows in product.split(PIECE_ROWS):
            magnitudes = rows.float().abs()
            self.activations.add(magnitudes, layer)
            self.outputs.add(magnitudes * self._norms[layer][expert], layer)


def down_weight(block: Any, expert: int) -> torch.Tensor:
    """Down projection of a block or of one of its experts, [hidden, neurons]."""
    down = block.down_proj
    return down[expert] if isinstance(down, torch.nn.Parameter) else down.weight


@torch.no_grad()
def down_norms(model: SparseModel) -> list[torch.Tensor]:
    """Norm of every neuron's column of the down projection, [experts, neurons] float32 for each layer."""
    experts = num_experts(model.config)
    return [
        torch.stack([down_weight(block, e).float().norm(dim=0) for e in range(experts)]) for block in model.ffn_blocks()
    ]


CETT_TARGETS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
CETT_TOLERANCE = 0.002
"""And no less than 2% of the target."""
MAX_ROUNDS = 4
GRID_SHARES = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.87, 0.92, 0.96, 0.985, 0.995)
"""Shares of a layer's non-zero values at which the search looks first."""

Batch = dict[str, torch.Tensor]


class Truncation(NamedTuple):
    threshold: float
    cett: float
    sparsity: float


class CettObserver:
    """Measures CETT at some thresholds of every layer during passes of a SparsityProbe.

    Args:
        norms: What `down_norms` gives for the model.
        thresholds: Of every layer, [layers][any number].
    """

    def __init__(self, norms: Sequence[torch.Tensor], thresholds: Sequence[Sequence[float]]) -> None:
        self._norms, self._thresholds = norms, thresholds
        self._errors = [[0.0] * len(layer) for layer in thresholds]
        self._dropped = [[0] * len(layer) for layer in thresholds]
        self._rows = [0] * len(thresholds)

    def begin(self, tokens: Tokens) -> None:
        """Nothing depends on the tokens."""

    def add(self, layer: int, expert: int, tokens: torch.Tensor, block: Any, product: torch.Tensor) -> None:
        """Adds the errors of one block's tokens; experts by their own outputs."""
        weight = down_weight(block, expert).to(product.dtype)  # of integers it is fp32
        self._rows[layer] += len(product)
        for rows in product.split(PIECE_ROWS):
            self._add_rows(layer, rows, weight, self._norms[layer][expert])

    def _add_rows(self, layer: int, product: torch.Tensor, weight: torch.Tensor, down: torch.Tensor) -> None:
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
            for rows, *layer in zip(self._rows, self._thresholds, self._errors, self._dropped, strict=True)
        ]


class CettSearch:
    """Finds the threshold of every layer that reaches a target error.

    The first pass looks at a grid of thresholds; every further one looks where the line through the nearest known thresholds
    on both sides of a target meets it. All layers and targets share the passes.
    """

    def __init__(self, model: SparseModel, batches: Sequence[Batch], outputs: Histogram) -> None:
        self._model, self._batches = model, batches
        self._norms = down_norms(model)
        num_layers = len(self._norms)
        grid = [
            [
                0.0,
                *(outputs.quantile(share, layer, of_nonzero=True, rank=round) for share in GRID_SHARES),
            ]
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
                    if abs(self.nearest(layer, target).cett - target) > max(CETT_TOLERANCE, 0.02 * target)
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
        found = observer.truncations(num_neurons(self._model.config))
        for known, new in zip(self._known, found, strict=True):
            known.extend(new)


PPL_PERCENTS = (1, 5, 10)
SHARES = (0.0, 0.5, 0.8, 0.85, 0.9)
"""The sparsities of TurboSparse's table 3."""
MAX_CETT = 0.95
MAX_PPL_SEARCH_PASSES = 8

SummedLoss = Callable[[SparseModel, Batch], torch.Tensor]


def measure_curves(
    model: SparseModel,
    batches: Iterable[Batch],
    summed_loss: SummedLoss,
) -> Curves:
    """Measures all curves on one text, in about thirty passes over it; the batches are as for `measure`, and kept in
    memory.
    """
    was_training = model.training
    model.eval()
    kept = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    try:
        with torch.no_grad():
            return _Measurement(model, kept, summed_loss).curves()
    finally:
        model.train(was_training)


class _Measurement:
    def __init__(
        self,
        model: SparseModel,
        batches: Sequence[Batch],
        summed_loss: SummedLoss,
    ) -> None:
        self._model, self._batches, self._summed_loss = model, batches, summed_loss
        self._num_labels = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        self._norms = down_norms(model)

    def curves(self) -> Curves:
        magnitudes = MagnitudeObserver(self._model)
        loss, zeros = self._loss(None, magnitudes)
        search = CettSearch(self._model, self._batches, magnitudes.outputs)
        search.search(CETT_TARGETS)
        cett = [self._cett_point(search, target, loss, zeros) for target in CETT_TARGETS]
        tried = [(point.target, point.loss, point.edited_sparsity) for point in cett]
        ppl = [self._ppl_point(search, percent, loss, tried) for percent in PPL_PERCENTS]
        unchanged = SharePoint(share=0.0, sparsity=zeros, loss=loss)
        top_k = [self._share_point(share, TopKMask(share)) for share in SHARES[1:]]
        fixed = [self._share_point(share, magnitude_mask(magnitudes.activations, share)) for share in SHARES[1:]]
        return Curves(
            num_tokens=sum(batch["input_ids"].numel() for batch in self._batches),
            num_labels=self._num_labels,
            loss=loss,
            cett=cett,
            ppl=ppl,
            top_k=[unchanged, *top_k],
            magnitude=[unchanged, *fixed],
        )

    def _loss(self, mask: TokenMask | None, *observers: Any) -> tuple[float, float]:
        with SparsityProbe(self._model, *observers, mask=mask) as probe:
            total = sum(float(self._summed_loss(self._model, batch)) for batch in self._batches)
        return total / self._num_labels, probe.statistics().zero_share("product")

    def _cett_point(self, search: CettSearch, target: float, loss: float, zeros: float) -> CettPoint:
        found = [search.nearest(layer, target) for layer in range(len(self._norms))]
        sparsities = [layer.sparsity for layer in found if not math.isnan(layer.sparsity)]
        if target > 0:
            mask = CettMask(self._norms, [layer.threshold for layer in found])
            loss, zeros = self._loss(mask)
        return CettPoint(
            target=target,
            sparsity=sum(sparsities) / len(sparsities),
            loss=loss,
            edited_sparsity=zeros,
            layers=[CettLayer(**layer._asdict()) for layer in found],
        )

    def _ppl_point(
        self,
        search: CettSearch,
        percent: int,
        loss: float,
        tried: list[tuple[float, float, float]],
    ) -> PplPoint:
        """Narrows down the CETT at which the perplexity is `percent` % higher; `tried` grows for the next one."""
        allowed = loss + math.log1p(percent / 100)
        for _ in range(MAX_PPL_SEARCH_PASSES):
            low, high = _bracket(tried, allowed)
            if high is None and low[0] >= MAX_CETT:
                break
            top = high or (MAX_CETT, math.inf, math.nan)
            if top[0] - low[0] < 1e-3 or allowed - low[1] < 0.05 * (allowed - loss):
                break
            # Between the middle and the straight line: either alone can creep.
            part = (allowed - low[1]) / (top[1] - low[1]) if math.isfinite(top[1]) else 1.0
            at = low[0] + (top[0] - low[0]) * min(max((part + 0.5) / 2, 0.05), 1.0)
            at = top[0] if high is None else at
            found, zeros = self._loss(CettMask(self._norms, search.thresholds(at)))
            tried.append((at, found, zeros))
        low, high = _bracket(tried, allowed)
        return PplPoint(
            percent=percent,
            cett=low[0],
            sparsity=low[2],
            loss=low[1],
            # Even at the highest error that was tried the perplexity had not risen that far.
            is_limit=high is None,
        )

    def _share_point(self, share: float, mask: TokenMask) -> SharePoint:
        loss, sparsity = self._loss(mask)
        return SharePoint(share=share, sparsity=sparsity, loss=loss)


def _bracket(
    tried: list[tuple[float, float, float]], allowed: float
) -> tuple[tuple[float, float, float], tuple[float, float, float] | None]:
    points = sorted(tried)
    for before, after in zip(points, points[1:]):  # noqa: B905, RUF007
        if after[1] > allowed or math.isnan(after[1]):
            return before, after
    return points[-1], None


def magnitude_mask(activations: Histogram, share: float) -> LayerThresholdMask:
    """The mask with the threshold of every layer that that share of its |h| does not exceed."""
    layers = range(len(activations.counts))
    return LayerThresholdMask([activations.quantile(share, layer, rank=round) for layer in layers])
