"""How sparse a model could be: what its loss does when small activations are left out.

Three rules, each with its published definition: thresholds at a target CETT, the |h| of highest rank of every token
(TurboSparse, arXiv 2406.05955, table 3), and a fixed threshold on |h| in every layer. CETT-PPL-p% (Sparsing Law, arXiv 2411.02335)
is the sparsity at the CETT where the perplexity has risen by p%.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from sparsify.models import SparseModel
from sparsify.sparsity.cett import CETT_TARGETS, Batch, CettSearch
from sparsify.sparsity.magnitudes import MagnitudeHistogram, MagnitudeObserver, down_norms
from sparsify.sparsity.probe import PIECE_ROWS, Editor, SparsityProbe
from sparsify.sparsity.schema import CettLayer, CettPoint, Curves, PplPoint, SharePoint

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
    on_progress: Callable[[str], None] | None = None,
) -> Curves:
    """Measures all curves on one text, in about thirty passes over it.

    Args:
        model: A sparse model; it is left in the mode that it was in.
        batches: As for `measure`; they are kept in memory.
        summed_loss: Cross-entropy of a batch, summed over its labels.
        on_progress: Told what begins.
    """
    was_training = model.training
    model.eval()
    kept = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    try:
        with torch.no_grad():
            return _Measurement(model, kept, summed_loss, on_progress or (lambda _: None)).curves()
    finally:
        model.train(was_training)


class _Measurement:
    def __init__(
        self,
        model: SparseModel,
        batches: Sequence[Batch],
        summed_loss: SummedLoss,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._batches, self._summed_loss, self._say = model, batches, summed_loss, say
        self._num_labels = sum(int((batch["labels"] >= 0).sum()) for batch in batches)
        self._norms = down_norms(model)

    def curves(self) -> Curves:
        self._say("magnitudes")
        magnitudes = MagnitudeObserver(self._model)
        loss, zeros = self._loss(None, magnitudes)
        self._say("CETT")
        search = CettSearch(self._model, self._batches, magnitudes.outputs)
        search.search(CETT_TARGETS)
        cett = [self._cett_point(search, target, loss, zeros) for target in CETT_TARGETS]
        self._say("CETT-PPL")
        tried = [(point.target, point.loss, point.edited_sparsity) for point in cett]
        ppl = [self._ppl_point(search, percent, loss, tried) for percent in PPL_PERCENTS]
        self._say("top-k and thresholds")
        unchanged = SharePoint(share=0.0, sparsity=zeros, loss=loss)
        top_k = [self._share_point(share, top_k_editor(share)) for share in SHARES[1:]]
        fixed = [
            self._share_point(share, magnitude_editor(magnitudes.activations, share))
            for share in SHARES[1:]
        ]
        return Curves(
            num_tokens=sum(batch["input_ids"].numel() for batch in self._batches),
            num_labels=self._num_labels,
            loss=loss,
            cett=cett,
            ppl=ppl,
            top_k=[unchanged, *top_k],
            magnitude=[unchanged, *fixed],
        )

    def _loss(self, editor: Editor | None, *observers: Any) -> tuple[float, float]:
        """Loss in nats per token and share of zeros, with activations as the editor leaves them."""
        with SparsityProbe(self._model, *observers, editor=editor) as probe:
            total = sum(float(self._summed_loss(self._model, batch)) for batch in self._batches)
        return total / self._num_labels, probe.statistics().zero_share("product")

    def _cett_point(
        self, search: CettSearch, target: float, loss: float, zeros: float
    ) -> CettPoint:
        found = [search.nearest(layer, target) for layer in range(len(self._norms))]
        sparsities = [layer.sparsity for layer in found if not math.isnan(layer.sparsity)]
        if target > 0:
            editor = cett_editor(self._norms, [layer.threshold for layer in found])
            loss, zeros = self._loss(editor)
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
            found, zeros = self._loss(cett_editor(self._norms, search.thresholds(at)))
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

    def _share_point(self, share: float, editor: Editor) -> SharePoint:
        loss, sparsity = self._loss(editor)
        return SharePoint(share=share, sparsity=sparsity, loss=loss)


def _bracket(
    tried: list[tuple[float, float, float]], allowed: float
) -> tuple[tuple[float, float, float], tuple[float, float, float] | None]:
    """The last CETT before the loss first exceeds what is allowed, and the first that exceeds it."""
    points = sorted(tried)
    for before, after in zip(points, points[1:]):  # noqa: B905, RUF007
        if after[1] > allowed or math.isnan(after[1]):
            return before, after
    return points[-1], None


def cett_editor(norms: Sequence[torch.Tensor], thresholds: Sequence[float]) -> Editor:
    """Leaves out the neurons whose output norm does not exceed their layer's threshold."""

    def kept(layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        return product.float().abs() * norms[layer][expert] > thresholds[layer]

    return _keep_only(kept)


def top_k_editor(share: float) -> Editor:
    """Leaves out that share of every token's neurons, those of the smallest |h|."""

    def kept(layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        number = max(1, round((1 - share) * product.shape[-1]))
        top = product.abs().topk(number, dim=-1).indices
        return torch.zeros_like(product, dtype=torch.bool).scatter_(-1, top, True)

    return _keep_only(kept)


def magnitude_editor(activations: MagnitudeHistogram, share: float) -> Editor:
    """Leaves out every |h| up to a threshold of its layer, which that share of its values does not exceed."""
    thresholds = [activations.threshold(layer, share) for layer in range(len(activations.counts))]

    def kept(layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        return product.float().abs() > thresholds[layer]

    return _keep_only(kept)


def _keep_only(kept: Editor) -> Editor:
    """Sets to zero what a rule does not keep, in place and some rows at a time: memory does not grow with the batch."""

    @torch.no_grad()
    def edit(layer: int, expert: int, product: torch.Tensor) -> torch.Tensor:
        for rows in product.split(PIECE_ROWS):
            rows.mul_(kept(layer, expert, rows))
        return product

    return edit
