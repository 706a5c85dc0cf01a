"""Evaluates predictors by the loss of the masked model and the bytes it reads, not by recall alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sparsify.models import SparseModel
from sparsify.models.masking import experts_per_token
from sparsify.predictors.format import Block, Predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.masking import PredictorMask, ScoreReader
from sparsify.predictors.schema import LayerPoint, PredictorEvaluation, ReadingCost, ThresholdPoint
from sparsify.sparsity.active_parameters import FFN_PARTS, ffn_byte_shares, parameters_by_part
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.statistics import ActivationStatistics

RECALLS = (0.999, 0.995, 0.99, 0.98, 0.96, 0.93, 0.88, 0.8, 0.65)
"""Recalls in the exact model whose thresholds are tried, in addition to the predictors' own threshold."""
STEP_DIGITS = 4

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Bytes:
    """Parameters that one token reads."""

    ffn: float
    predictors: float
    rest: float

    def cost(self, name: str, loss: float, on_share: float, ffn_share: float) -> ReadingCost:
        dense, read = self.ffn + self.rest, self.ffn * ffn_share + self.rest
        return ReadingCost(
            name=name,
            loss=loss,
            on_share=on_share,
            ffn_bytes=ffn_share,
            ffn_speedup=1 / ffn_share,
            model_speedup=dense / read,
        )


def evaluate_predictors(
    model: SparseModel,
    predictors: Predictors,
    batches: Sequence[Batch],
    *,
    name: str,
    folder: str,
    text: str,
    max_loss_rise: float,
    thresholds: Sequence[float] = (),
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictorEvaluation:
    """Measures the loss of the exact model, and of the masked model at every threshold.

    A threshold can be chosen if the loss rises by no more than the limit, a token reads fewer bytes than with an exact kernel
    that reads the gate first (which needs no predictor), and the recall is at least that of a fixed mask of the neurons that
    fire most often. The one that reads least is chosen. A predictor that switches everything on has perfect recall and no
    rise of the loss, and fails the second rule.

    Args:
        model: The model that the predictors were trained for.
        predictors: Predictors to evaluate.
        batches: input_ids, position_ids and shifted labels, [1, tokens] each, of text that was not trained on.
        name: Name of the model.
        folder: Folder of the predictors.
        text: Description of the batches.
        max_loss_rise: Limit on the rise of the loss, nats per token.
        thresholds: Thresholds to try; by default chosen by recall.
        on_progress: Called with the passes done and the total.

    Raises:
        ModelError: If the predictors belong to another model.
    """
    predictors.check_model(model, folder)
    kept = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    evaluator = _Evaluator(model, predictors.to(model.device), kept, on_progress or (lambda *_: None))
    return evaluator.evaluate(name, folder, text, max_loss_rise, thresholds)


class _Evaluator:
    def __init__(
        self,
        model: SparseModel,
        predictors: Predictors,
        batches: Sequence[Batch],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._model, self._predictors, self._batches = model, predictors, batches
        self._on_progress = on_progress
        self._num_labels = sum(int((b["labels"] != IGNORED_LABEL).sum()) for b in batches)
        self._bytes = _bytes(model, predictors)

    def evaluate(self, name: str, folder: str, text: str, limit: float, given: Sequence[float]) -> PredictorEvaluation:
        with BlockInputs(self._model, self._predictors.facts.input) as inputs:
            reader = ScoreReader(self._predictors, inputs)
            loss, statistics = self._loss(reader)
        gate_zeros, zeros = statistics.zero_share("gate"), statistics.zero_share("product")
        gate_first, perfect = ffn_byte_shares(gate_zeros, zeros)
        own = self._predictors.facts.threshold
        found = (round(reader.histogram.threshold(recall), STEP_DIGITS) for recall in RECALLS)
        tried = sorted(set(given) or {own, *found})
        points = []
        for number, threshold in enumerate(tried, start=1):
            self._on_progress(number, len(tried) + 1)
            points.append(self._point(threshold, loss, statistics, gate_first, limit))
        usable = [point for point in points if not point.refusal]
        best = min(usable, key=lambda point: point.ffn_bytes, default=None)
        cost = self._bytes.cost
        return PredictorEvaluation(
            model=name,
            predictors=folder,
            input=self._predictors.facts.input,
            text=text,
            num_tokens=sum(batch["input_ids"].numel() for batch in self._batches),
            num_labels=self._num_labels,
            max_loss_rise=limit,
            predictor_share=self._bytes.predictors / self._bytes.ffn,
            references=[
                cost("dense: all neurons", loss, 1.0, 1.0),
                cost("exact: gate first, no predictor", loss, 1 - gate_zeros, gate_first),
                cost("perfect predictor of size 0", loss, 1 - zeros, max(perfect, 1e-9)),
            ],
            points=points,
            chosen=best.threshold if best else None,
            verdict=_verdict(best, points, gate_first),
        )

    def _point(
        self,
        threshold: float,
        loss: float,
        statistics: ActivationStatistics,
        gate_first: float,
        limit: float,
    ) -> ThresholdPoint:
        with BlockInputs(self._model, self._predictors.facts.input) as inputs:
            mask = PredictorMask(self._predictors, inputs, threshold)
            masked_loss, _ = self._loss(mask)
        fired, hit, on, values = torch.stack(list(mask.counts.values())).sum(0).tolist()
        on_share, rise = on / values, masked_loss - loss
        read = on_share + self._bytes.predictors / self._bytes.ffn
        cost = self._bytes.cost(f"predicted above {threshold:g}", masked_loss, on_share, read)
        recall, static = _share(hit, fired), _static_recall(mask.counts, statistics)
        return ThresholdPoint(
            **cost.model_dump(),
            threshold=threshold,
            recall=recall,
            precision=_share(hit, on),
            static_recall=static,
            loss_rise=rise,
            refusal=_refusal(rise, limit, read, gate_first, recall, static),
            layers=_layers(mask.counts),
        )

    @torch.no_grad()
    def _loss(self, mask: PredictorMask | ScoreReader) -> tuple[float, ActivationStatistics]:
        with SparsityProbe(self._model, mask=mask) as probe:
            total = sum(float(summed_loss(self._model, batch)) for batch in self._batches)
        return total / max(self._num_labels, 1), probe.statistics()


def _refusal(rise: float, limit: float, read: float, gate_first: float, recall: float | None, static: float) -> str:
    if not rise <= limit:
        return f"the loss rises by {rise:.4f}"
    if read >= gate_first:
        return f"reads {read:.0%} of the bytes; gate first reads {gate_first:.0%} and is exact"
    if recall is not None and recall < static:
        return f"a fixed mask of the same size has a recall of {static:.1%}"
    return ""


def _verdict(best: ThresholdPoint | None, points: Sequence[ThresholdPoint], gate_first: float) -> str:
    if best is not None:
        return (
            f"Above {best.threshold:g} the loss rises by {best.loss_rise:.4f} nats, a token reads {best.ffn_bytes:.1%} of the "
            f"feed-forward bytes, and the predicted speed-up of the model over dense is {best.model_speedup:.2f}, if time is proportional to bytes read."
        )
    if all(point.on_share > 0.99 for point in points):
        return "These predictors switch everything on: recall is perfect, and nothing is saved."
    return (
        f"No threshold keeps the loss within the limit and reads less than gate first ({gate_first:.1%} of the bytes, exact, "
        "without a predictor)."
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _layers(counts: dict[Block, torch.Tensor]) -> list[LayerPoint]:
    by_layer: dict[int, torch.Tensor] = {}
    for (layer, _), values in counts.items():
        by_layer[layer] = by_layer.get(layer, 0) + values
    return [
        LayerPoint(
            layer=layer,
            recall=_share(hit, fired),
            precision=_share(hit, on),
            on_share=_share(on, values),
        )
        for layer, (fired, hit, on, values) in ((layer, total.tolist()) for layer, total in sorted(by_layer.items()))
    ]


def _static_recall(counts: dict[Block, torch.Tensor], statistics: ActivationStatistics) -> float:
    """Recall of a fixed mask that switches on as many neurons of each block, those that fire most often."""
    hit = total = 0
    for (layer, expert), values in counts.items():
        often = statistics.product_fired[layer, expert].sort(descending=True).values
        on = round(int(values[2]) / int(values[3]) * len(often))
        hit += int(often[:on].sum())
        total += int(often.sum())
    return hit / total if total else 1.0


def _bytes(model: SparseModel, predictors: Predictors) -> _Bytes:
    """Parameters that one token reads, all weights in one dtype; the one row of the embedding is not counted."""
    parts = parameters_by_part(model)
    experts = predictors.facts.num_experts
    computed = experts_per_token(model.config) / experts
    embedding = 0 if model.config.tie_word_embeddings else parts["embeddings"]
    ffn = sum(parts[part] for part in FFN_PARTS)
    rest = sum(parts.values()) - ffn - embedding
    return _Bytes(ffn * computed, predictors.num_parameters * computed, rest)
