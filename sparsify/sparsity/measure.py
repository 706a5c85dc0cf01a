"""Measures a model's sparsity and loss on a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import nn

from sparsify.errors import RunError
from sparsify.models import SparseModel
from sparsify.sparsity.definitions import definitions
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.schema import LayerRow, SparsityReport
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
        on_progress: Called after every batch with the number of tokens so far.

    Returns:
        The report, to which the caller may add stages, trajectory and command; and the counts it rests on.

    Raises:
        RunError: If the batches hold no label to predict.
    """
    was_training = model.training
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    num_tokens = num_labels = 0
    model.eval()
    try:
        with torch.no_grad(), SparsityProbe(model) as probe:
            for batch in batches:
                batch = {key: value.to(device) for key, value in batch.items()}
                loss_sum += _summed_loss(model, batch)
                num_labels += int((batch["labels"] != IGNORED_LABEL).sum())
                num_tokens += batch["input_ids"].numel()
                if on_progress is not None:
                    on_progress(num_tokens)
    finally:
        model.train(was_training)
    if num_labels == 0:
        raise RunError(
            f"The sparsity report has nothing to measure: {text} holds {num_tokens} tokens and no labels.",
            next_step="Choose a longer text, or raise eval.report_tokens.",
        )
    statistics = probe.statistics()
    loss = float(loss_sum) / num_labels
    return _report(model, statistics, name, text, loss, num_labels), statistics


def _summed_loss(model: SparseModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
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
    name: str,
    text: str,
    loss: float,
    num_labels: int,
) -> SparsityReport:
    facts = {
        "ffn_activation": model.config.ffn_activation,
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
        loss=loss,
        layers=layer_rows(statistics),
        definitions=definitions(**facts),
        **facts,
    )


def layer_rows(statistics: ActivationStatistics) -> list[LayerRow]:
    """One row a layer; in a mixture of experts followed by one row for each of its experts."""
    experts = range(statistics.num_experts) if statistics.num_experts > 1 else ()
    return [
        _row(statistics.select(layer, expert), layer, expert)
        for layer in range(statistics.num_layers)
        for expert in (None, *experts)
    ]


def _row(block: ActivationStatistics, layer: int, expert: int | None) -> LayerRow:
    def known(share: float) -> float | None:
        return None if math.isnan(share) else share

    return LayerRow(
        layer=layer,
        expert=expert,
        num_tokens=int(block.routed_tokens.sum()),
        gate_zeros=known(block.zero_share("gate")),
        up_zeros=known(block.zero_share("up")),
        product_zeros=known(block.zero_share("product")),
        p5=known(block.zero_share_percentile(5)),
        p50=known(block.zero_share_percentile(50)),
        p95=known(block.zero_share_percentile(95)),
        num_neurons=block.product_fired.numel(),
        dead_neurons=int(block.dead_neurons().sum()),
        always_on_neurons=int(block.always_on_neurons().sum()),
    )
