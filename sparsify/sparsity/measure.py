"""Measures a model's sparsity and loss on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat

import torch
from torch import nn

from sparsify.errors import RunError
from sparsify.models import SparseModel
from sparsify.sparsity.active_parameters import active_parameters, parameters_by_part
from sparsify.sparsity.consecutive import ConsecutiveObserver, ConsecutiveStatistics
from sparsify.sparsity.definitions import definitions
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.rows import (
    SourceCounts,
    engine_section,
    firing_curves,
    layer_rows,
    position_rows,
    source_rows,
)
from sparsify.sparsity.schema import Against, SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics

IGNORED_LABEL = -100
# Logits are turned into fp32 this many positions at a time: a whole window of a large vocabulary would double memory.
LOSS_CHUNK_TOKENS = 1024


def measure(
    model: SparseModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    name: str,
    text: str,
    sources: Iterable[str] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[SparsityReport, ActivationStatistics]:
    """Measures exact zeros and the loss in one pass over a text, in this process alone.

    Args:
        model: A sparse model; it is left in the mode (training or evaluation) that it was in.
        batches: Dictionaries of input_ids, position_ids and labels, [batch, tokens] each. Positions start again at 0
            with every packed document. Labels are already shifted; -100 marks positions without a label, which count
            for the zeros all the same.
        name: Name of the model for the report.
        text: What the batches are, in words.
        sources: Name of the source of each batch; `text` for all of them unless given.
        on_progress: Called after every batch with the number of tokens so far.

    Returns:
        The report, to which the caller may add stages, trajectory and command; and the counts it rests on.

    Raises:
        RunError: If the batches hold no label to predict.
    """
    was_training = model.training
    experts = getattr(model.config, "num_local_experts", 1)
    width = model.config.intermediate_size
    consecutive = ConsecutiveObserver(len(model.model.layers), experts, width)
    by_source: dict[str, SourceCounts] = {}
    num_tokens = 0
    model.eval()
    try:
        with torch.no_grad(), SparsityProbe(model, consecutive) as probe:
            before = probe.layer_totals()
            for batch, source in zip(batches, repeat(text) if sources is None else sources):  # noqa: B905
                counts = by_source.setdefault(source, SourceCounts())
                batch = {key: value.to(model.device) for key, value in batch.items()}
                counts.loss_sum += float(summed_loss(model, batch))
                counts.num_labels += int((batch["labels"] != IGNORED_LABEL).sum())
                counts.num_tokens += batch["input_ids"].numel()
                now = probe.layer_totals()
                counts.values = counts.values + now - before
                before = now
                num_tokens += batch["input_ids"].numel()
                if on_progress is not None:
                    on_progress(num_tokens)
    finally:
        model.train(was_training)
    if not any(counts.num_labels for counts in by_source.values()):
        raise RunError(
            f"The sparsity report has nothing to measure: {text} holds {num_tokens} tokens and no labels.",
            next_step="Choose a longer text, or raise eval.report_tokens.",
        )
    statistics = probe.statistics()
    return _report(model, statistics, consecutive.statistics, name, text, by_source), statistics


def summed_loss(model: SparseModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of a batch in nats, summed over its labels. [] float64"""
    logits = model(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
    ).logits
    chunks = zip(
        logits.flatten(0, 1).split(LOSS_CHUNK_TOKENS),
        batch["labels"].flatten().split(LOSS_CHUNK_TOKENS),
        strict=True,
    )
    losses = [
        nn.functional.cross_entropy(
            scores.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum"
        )
        for scores, labels in chunks
    ]
    return torch.stack(losses).double().sum()


def _report(
    model: SparseModel,
    statistics: ActivationStatistics,
    consecutive: ConsecutiveStatistics,
    name: str,
    text: str,
    by_source: dict[str, SourceCounts],
) -> SparsityReport:
    num_labels = sum(counts.num_labels for counts in by_source.values())
    facts = {
        "ffn_activation": model.config.ffn_activation,
        "ffn_thresholds": model.config.ffn_thresholds,
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_tokens": int(statistics.num_tokens),
        "num_experts": statistics.num_experts,
        "experts_per_token": getattr(model.config, "num_experts_per_tok", 1),
    }
    return SparsityReport(
        model=name,
        model_type=model.config.model_type,
        text=text,
        num_labels=num_labels,
        gate_zeros=statistics.zero_share("gate"),
        up_zeros=statistics.zero_share("up"),
        product_zeros=statistics.zero_share("product"),
        num_neurons=statistics.product_fired.numel(),
        dead_neurons=int(statistics.dead_neurons().sum()),
        always_on_neurons=int(statistics.always_on_neurons().sum()),
        loss=sum(counts.loss_sum for counts in by_source.values()) / num_labels,
        layers=layer_rows(statistics),
        sources=source_rows(by_source),
        positions=position_rows(statistics, model),
        firing_curves=firing_curves(statistics),
        engine=engine_section(statistics, consecutive),
        active_parameters=active_parameters(
            parameters_by_part(model),
            expert_share=facts["experts_per_token"] / statistics.num_experts,
            gate_zeros=statistics.zero_share("gate"),
            product_zeros=statistics.zero_share("product"),
        ),
        definitions=definitions(**facts, dead_rate_bound=statistics.firing_rate_bound()),
        **facts,
    )


def as_against(report: SparsityReport) -> Against:
    """The part of a report that is set beside another model's."""
    return Against(
        model=report.model,
        ffn_activation=report.ffn_activation,
        loss=report.loss,
        product_zeros=report.product_zeros,
        layers=[row.product_zeros or 0.0 for row in report.layer_rows],
        active_parameters=report.active_parameters,
        curves=report.curves,
    )
