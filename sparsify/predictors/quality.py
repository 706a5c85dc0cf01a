"""Evaluates predictors by the loss of the masked model and the bytes it reads, not by recall alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from sparsify.methods.live_model import is_router
from sparsify.models import SparseModel
from sparsify.models.masking import GROUP, experts_per_token
from sparsify.predictors.engines import ENGINES, OWN, POWERINFER, WithoutThresholds, as_held
from sparsify.predictors.format import Block, Predictors
from sparsify.predictors.inputs import BlockInputs
from sparsify.predictors.predictor_mask import PredictorMask, ScoreReader
from sparsify.predictors.schema import LayerPoint, PredictorEvaluation, ReadingCost, ThresholdPoint
from sparsify.sparsity.active_parameters import FFN_PARTS, ffn_byte_shares, parameters_by_part
from sparsify.sparsity.measure import IGNORED_LABEL, summed_loss
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.statistics import ActivationStatistics

RECALLS = (0.999, 0.995, 0.99, 0.98, 0.96, 0.93, 0.88, 0.8, 0.65)
"""Recalls in the exact model whose thresholds are tried, in addition to the predictors' own threshold."""
STEP_DIGITS = 4
ROUTERS = "exact: its own routers, no predictor"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Bytes:
    """Parameters that one token reads."""

    ffn: float
    predictors: float
    routers: float
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
    engine: str = OWN,
    on_progress: Callable[[int, int], None] | None = None,
) -> PredictorEvaluation:
    """Measures the loss of the exact model, and of the masked model in an engine's arithmetic at every threshold.

    A threshold can be chosen if the loss rises by no more than the limit, a token reads fewer bytes than with the engine's exact
    kernel (which needs no predictor: it reads the gate first, in a model with routers of groups only of those that they keep) or,
    if it has none, than dense, and the recall is at least that of a fixed mask of the neurons that fire most often. The one that reads least is chosen. A predictor that switches
    everything on has perfect recall and no rise of the loss, and fails the second rule. The exact model is the one that was
    trained, with its thresholds, also where the engine does not apply them.

    Batches hold input_ids, position_ids and shifted labels, [1, tokens] each, of text that was not trained on; the limit is in
    nats per token. Thresholds are chosen by recall unless given. PowerInfer's input is the residual, for which predictors of
    the normed input are exact at 0 alone: no other threshold is tried with them.

    Raises:
        ModelError: If the predictors belong to another model.
    """
    predictors.check_model(model, folder)
    kept = [{key: value.to(model.device) for key, value in batch.items()} for batch in batches]
    folds = engine == POWERINFER and predictors.facts.input == "normed"
    tried = (0.0,) if folds else thresholds
    held = as_held(predictors, model, engine).to(model.device)
    evaluator = _Evaluator(model, held, kept, engine, on_progress or (lambda *_: None))
    evaluation = evaluator.evaluate(name, folder, text, max_loss_rise, tried)
    evaluation.input = predictors.facts.input
    return evaluation


class _Evaluator:
    def __init__(
        self,
        model: SparseModel,
        predictors: Predictors,
        batches: Sequence[Batch],
        engine: str,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._model, self._predictors, self._batches = model, predictors, batches
        self._engine, self._arithmetic = engine, ENGINES[engine]
        masked = any(block.ffn_activation.is_masked for block in model.ffn_blocks())
        self._drops_thresholds = masked and not self._arithmetic.keeps_thresholds
        self._on_progress = on_progress
        self._num_labels = sum(int((b["labels"] != IGNORED_LABEL).sum()) for b in batches)
        self._bytes = _bytes(model, predictors)
        self._exact_by = "what its own routers keep" if self._bytes.routers else "gate first"

    def evaluate(self, name: str, folder: str, text: str, limit: float, given: Sequence[float]) -> PredictorEvaluation:
        with BlockInputs(self._model, self._predictors.facts.input) as inputs:
            reader = ScoreReader(self._predictors, inputs)
            loss, statistics = self._loss(reader)
        gate_zeros, zeros = statistics.zero_share("gate"), statistics.zero_share("product")
        gate_first, perfect = ffn_byte_shares(gate_zeros, zeros)
        active = self._active_groups(statistics)
        if active is not None:  # of a group that is on, gate rows are read, and the others of what fires
            gate_first = (active + 2 * (1 - zeros)) / 3 + self._bytes.routers / self._bytes.ffn
        exact = gate_first if self._arithmetic.gate_first else None
        own = self._predictors.facts.threshold
        found = (round(reader.histogram.threshold(recall), STEP_DIGITS) for recall in RECALLS)
        tried = sorted(set(given) or {own, *found})
        points = []
        for number, threshold in enumerate(tried, start=1):
            self._on_progress(number, len(tried) + 1)
            points.append(self._point(threshold, loss, statistics, exact, limit))
        usable = [point for point in points if not point.refusal]
        best = min(usable, key=lambda point: point.ffn_bytes, default=None)
        cost = self._bytes.cost
        references = [cost("dense: all neurons", loss, 1.0, 1.0)]
        if active is not None and exact is not None:
            routers = cost(ROUTERS, loss, active, exact)
            references.append(routers.model_copy(update={"recall": 1.0, "precision": (1 - zeros) / max(active, 1e-9)}))
        elif exact is not None:
            references.append(cost("exact: gate first, no predictor", loss, 1 - gate_zeros, exact))
        references.append(cost("perfect predictor of size 0", loss, 1 - zeros, max(perfect, 1e-9)))
        return PredictorEvaluation(
            model=name,
            predictors=folder,
            engine=self._engine,
            dropped_thresholds=self._drops_thresholds,
            input=self._predictors.facts.input,
            text=text,
            num_tokens=sum(batch["input_ids"].numel() for batch in self._batches),
            num_labels=self._num_labels,
            max_loss_rise=limit,
            predictor_share=self._bytes.predictors / self._bytes.ffn,
            references=references,
            points=points,
            chosen=best.threshold if best else None,
            verdict=_verdict(best, points, exact, self._exact_by, self._drops_thresholds),
        )

    def _active_groups(self, statistics: ActivationStatistics) -> float | None:
        """Share of groups that the model's own routers keep; None without routers."""
        zeros = statistics.site_zero_shares().get(GROUP)
        return None if zeros is None else 1 - zeros

    def _point(
        self,
        threshold: float,
        loss: float,
        statistics: ActivationStatistics,
        gate_first: float | None,
        limit: float,
    ) -> ThresholdPoint:
        with ExitStack() as entered:
            inputs = entered.enter_context(BlockInputs(self._model, self._predictors.facts.input))
            mask = PredictorMask(self._predictors, inputs, threshold, at_threshold=self._arithmetic.at_threshold)
            if self._drops_thresholds:
                mask.fired = entered.enter_context(WithoutThresholds(self._model)).fired
            masked_loss, _ = self._loss(mask)
        fired, hit, on, values = torch.stack(list(mask.counts.values())).sum(0).tolist()
        on_share, rise = on / values, masked_loss - loss
        read = on_share + self._bytes.predictors / self._bytes.ffn
        cost = self._bytes.cost(f"predicted above {threshold:g}", masked_loss, on_share, read)
        recall, static = _share(hit, fired), _static_recall(mask.counts, statistics)
        return ThresholdPoint(
            **cost.model_dump(exclude={"recall", "precision"}),
            threshold=threshold,
            recall=recall,
            precision=_share(hit, on),
            static_recall=static,
            loss_rise=rise,
            refusal=_refusal(rise, limit, read, gate_first, recall, static, self._exact_by),
            layers=_layers(mask.counts),
        )

    @torch.no_grad()
    def _loss(self, mask: PredictorMask | ScoreReader) -> tuple[float, ActivationStatistics]:
        with SparsityProbe(self._model, mask=mask) as probe:
            total = sum(float(summed_loss(self._model, batch)) for batch in self._batches)
        return total / max(self._num_labels, 1), probe.statistics()


def _refusal(
    rise: float, limit: float, read: float, gate_first: float | None, recall: float | None, static: float, by: str
) -> str:
    if not rise <= limit:
        return f"the loss rises by {rise:.4f}"
    if gate_first is not None and read >= gate_first:
        return f"reads {read:.0%} of the bytes; {by} reads {gate_first:.0%} and is exact"
    if read >= 1:
        return f"reads {read:.0%} of the bytes, no fewer than dense"
    if recall is not None and recall < static:
        return f"a fixed mask of the same size has a recall of {static:.1%}"
    return ""


def _verdict(
    best: ThresholdPoint | None,
    points: Sequence[ThresholdPoint],
    gate_first: float | None,
    by: str,
    dropped_thresholds: bool,
) -> str:
    without = ", without the thresholds that the model stores," if dropped_thresholds else ""
    if best is not None:
        return (
            f"Above {best.threshold:g}{without} the loss rises by {best.loss_rise:.4f} nats, a token reads {best.ffn_bytes:.1%} of the "
            f"feed-forward bytes, and the predicted speed-up of the model over dense is {best.model_speedup:.2f}, if time is proportional to bytes read."
        )
    if all(point.on_share > 0.99 for point in points):
        return "These predictors switch everything on: recall is perfect, and nothing is saved."
    dense = "dense" if gate_first is None else f"{by} ({gate_first:.1%} of the bytes, exact, without a predictor)"
    return f"No threshold{without} keeps the loss within the limit and reads less than {dense}."


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
    routers = sum(p.numel() for name, p in model.named_parameters() if is_router(name))
    return _Bytes(ffn * computed, predictors.num_parameters * computed, routers * computed, rest)
