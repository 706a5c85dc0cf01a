"""Measures a model's sparsity and loss on a text, and turns the counts into a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, repeat
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsify.errors import RunError
from sparsify.methods.density import weight_density
from sparsify.methods.mohd import BLOCKS, HiddenRecord, HiddenRouterMeter, is_hidden_routed
from sparsify.models import SparseConfig, SparseModel, site_rules
from sparsify.models.masking import experts_per_token, hidden_share, num_experts, num_neurons
from sparsify.sparsity.active_parameters import (
    active_parameters,
    ffn_byte_shares,
    parameters_by_part,
)
from sparsify.sparsity.consecutive import CHUNK_TOKENS, ConsecutiveObserver, ConsecutiveStatistics
from sparsify.sparsity.definitions import ROUTING_DEFINITIONS, definitions
from sparsify.sparsity.integer_weights import measure_integers
from sparsify.sparsity.probe import SparsityProbe
from sparsify.sparsity.routers import RouterReader
from sparsify.sparsity.schema import (
    Against,
    ChunkRow,
    EngineStatistics,
    HiddenRouting,
    HiddenRoutingRow,
    LayerRow,
    PositionRow,
    SourceRow,
    SparsityReport,
)
from sparsify.sparsity.sparse_weights import measure_weight_zeros
from sparsify.sparsity.statistics import POSITION_STARTS, ActivationStatistics, Factor

CURVE_POINTS = 101
FACTORS: dict[str, Factor] = {"gate": "gate", "up": "up", "inter": "product"}
"""What counts the zeros of the sites inside a block."""


def known(share: float) -> float | None:
    return None if math.isnan(share) else share


def layer_rows(statistics: ActivationStatistics) -> list[LayerRow]:
    experts = range(statistics.num_experts) if statistics.num_experts > 1 else ()
    return [
        _row(statistics.select(layer, expert), layer, expert)
        for layer in range(statistics.num_layers)
        for expert in (None, *experts)
    ]


def _row(block: ActivationStatistics, layer: int, expert: int | None) -> LayerRow:
    causes = block.zero_causes()
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
        gate_only_zeros=known(causes["gate_only"]),
        up_only_zeros=known(causes["up_only"]),
        both_zeros=known(causes["both"]),
        underflow_zeros=known(causes["underflow"]),
        num_neurons=block.product_fired.numel(),
        dead_neurons=int(block.dead_neurons().sum()),
        always_on_neurons=int(block.always_on_neurons().sum()),
        firing_rate_bound=known(block.firing_rate_bound()),
        site_zeros=block.site_zero_shares() if expert is None else {},
    )


@dataclass
class SourceCounts:
    """Counts of one source of the text.

    Attributes:
        values: Number of values, and of non-zero values of gate, up and product, [layers, 4].
    """

    loss_sum: float = 0.0
    num_tokens: int = 0
    num_labels: int = 0
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 4, dtype=torch.int64))


def source_rows(sources: Mapping[str, SourceCounts]) -> list[SourceRow]:
    rows = []
    for name, counts in sources.items():
        values, *fired = counts.values.sum(0).tolist()
        gate, up, product = (1 - count / values for count in fired)
        rows.append(
            SourceRow(
                source=name,
                num_tokens=counts.num_tokens,
                num_labels=counts.num_labels,
                loss=counts.loss_sum / counts.num_labels if counts.num_labels else None,
                gate_zeros=gate,
                up_zeros=up,
                product_zeros=product,
                layers=(1 - counts.values[:, 3].double() / counts.values[:, 0]).tolist(),
            )
        )
    return rows


def position_rows(statistics: ActivationStatistics, model: SparseModel) -> list[PositionRow]:
    per_token = experts_per_token(model.config)
    ends = dict(pairwise(POSITION_STARTS))
    return [
        PositionRow(
            first=first,
            last=ends[first] - 1 if first in ends else None,
            num_tokens=num_tokens // per_token,
            product_zeros=zeros,
        )
        for first, (num_tokens, zeros) in statistics.position_zero_shares().items()
    ]


def sorted_firing_rates(statistics: ActivationStatistics) -> np.ndarray:
    """Firing rates of each layer in descending order; 0 for experts without tokens.

    Returns:
        [layers, experts * neurons].
    """
    rates = statistics.firing_rates().nan_to_num(0.0).flatten(1)
    return rates.sort(dim=1, descending=True).values.numpy()


def firing_curves(statistics: ActivationStatistics) -> list[list[float]]:
    """`sorted_firing_rates` at evenly spaced neurons, [layers][at most CURVE_POINTS]."""
    rates = sorted_firing_rates(statistics)
    at = np.unique(np.linspace(0, rates.shape[1] - 1, CURVE_POINTS).round().astype(int))
    return rates[:, at].tolist()


def realised_density(statistics: ActivationStatistics, config: SparseConfig) -> float:
    """Weight density (`methods/density.py`) from the zeros that were counted at each site of each layer, whatever made them; mean over
    layers.
    """
    layers = [statistics.select(layer) for layer in range(statistics.num_layers)]
    zeros = [
        {site: layer.zero_share(factor) for site, factor in FACTORS.items()} | layer.site_zero_shares()
        for layer in layers
    ]
    rules = site_rules(config)
    return fmean(weight_density(config, {site: 1 - share for site, share in one.items()}, rules) for one in zeros)


def engine_section(
    statistics: ActivationStatistics, consecutive: ConsecutiveStatistics, width: float
) -> EngineStatistics:
    """What an inference engine can exploit: unions over tokens, reuse, co-activation, weights read. Blocks read and write the share
    `width` of the hidden size.
    """
    unions = consecutive.chunk_unions(statistics.num_experts * statistics.num_neurons)
    gap, independent = consecutive.coactivation_gap()
    gate_first, perfect = ffn_byte_shares(statistics.zero_share("gate"), statistics.zero_share("product"))
    return EngineStatistics(
        chunks=[
            ChunkRow(
                num_tokens=length,
                num_chunks=num_chunks,
                consecutive=known(union),
                unrelated=known(statistics.union_of_unrelated_tokens(length)),
            )
            for length, (num_chunks, union) in zip(CHUNK_TOKENS, unions, strict=True)
        ],
        reuse=[known(share) for share in consecutive.reuse()],
        coactivation_gap=known(gap),
        independent_coactivation_gap=known(independent),
        sampled_neurons=consecutive.together.shape[-1],
        gate_first_ffn_bytes=width * gate_first,
        perfect_predictor_ffn_bytes=width * perfect,
    )


IGNORED_LABEL = -100
LOSS_CHUNK_TOKENS = 1024
"""Positions whose logits are converted to fp32 at once; a whole sequence of a large vocabulary would double memory."""


def measure(
    model: SparseModel,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    name: str,
    text: str,
    sources: Iterable[str] | None = None,
    on_batch: Callable[[float, int], None] | None = None,
) -> tuple[SparsityReport, ActivationStatistics]:
    """Measures exact zeros and loss in one pass over a text, in this process.

    Args:
        model: A sparse model; its training mode is restored afterwards.
        batches: Dictionaries of input_ids, position_ids and labels, [batch, tokens] each. Positions start again at 0
            with every packed document. Labels are already shifted; -100 marks positions without a label, which still
            count for the zeros.
        name: Name of the model in the report.
        text: Description of the text.
        sources: Name of the source of each batch; default: `text` for all batches.
        on_batch: Called after every batch with its summed loss in nats and its number of labels.

    Returns:
        The report, to which the caller may add stages, trajectory and command, and its counts.

    Raises:
        RunError: If the batches have no labels.
    """
    was_training = model.training
    experts = num_experts(model.config)
    width = num_neurons(model.config)
    consecutive = ConsecutiveObserver(len(model.model.layers), experts, width)
    by_source: dict[str, SourceCounts] = {}
    num_tokens = 0
    hidden = HiddenRouterMeter(model, model.device) if is_hidden_routed(model.config) else None
    model.eval()
    try:
        with (
            torch.no_grad(),
            SparsityProbe(model, consecutive) as probe,
            RouterReader(model) as routers,
            hidden or nullcontext(),
        ):
            before = probe.layer_totals()
            for batch, source in zip(batches, repeat(text) if sources is None else sources):  # noqa: B905
                counts = by_source.setdefault(source, SourceCounts())
                batch = {key: value.to(model.device) for key, value in batch.items()}
                loss = float(summed_loss(model, batch))
                num_labels = int((batch["labels"] != IGNORED_LABEL).sum())
                counts.loss_sum += loss
                counts.num_labels += num_labels
                counts.num_tokens += batch["input_ids"].numel()
                now = probe.layer_totals()
                counts.values = counts.values + now - before
                before = now
                num_tokens += batch["input_ids"].numel()
                if on_batch is not None:
                    on_batch(loss, num_labels)
    finally:
        model.train(was_training)
    if not any(counts.num_labels for counts in by_source.values()):
        raise RunError(
            f"The sparsity report has nothing to measure: {text} has {num_tokens} tokens and no labels.",
            next_step="Choose a longer text, or raise eval.report_tokens.",
        )
    statistics = probe.statistics()
    report = _report(model, statistics, consecutive.statistics, name, text, by_source)
    report.routers = routers.rows()
    if hidden is not None:
        report.hidden_routing = hidden_routing(model.config, hidden.record())
        report.definitions |= ROUTING_DEFINITIONS
    return report, statistics


def hidden_routing(config: Any, record: HiddenRecord) -> HiddenRouting:
    rows = [
        HiddenRoutingRow(layer=layer, block=block, load=load, entropy=entropy)
        for layer, pair in enumerate(zip(record.load, record.entropy, strict=True))
        for block, load, entropy in zip(BLOCKS, *pair, strict=True)
    ]
    return HiddenRouting(
        sub_dimensions=config.sub_dimensions,
        shared=config.shared_sub_dimensions,
        active=config.active_sub_dimensions,
        rows=rows,
    )


def summed_loss(model: SparseModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of a batch in nats, summed over its labels. [] float64"""
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    chunks = zip(
        logits.flatten(0, 1).split(LOSS_CHUNK_TOKENS),
        batch["labels"].flatten().split(LOSS_CHUNK_TOKENS),
        strict=True,
    )
    losses = [
        nn.functional.cross_entropy(scores.float(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
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
    density = realised_density(statistics, model.config)
    facts = {
        "ffn_activation": model.config.ffn_activation,
        "masks": {site: rule.words for site, rule in site_rules(model.config).items()},
        "dtype": str(model.dtype).removeprefix("torch."),
        "num_tokens": int(statistics.num_tokens),
        "num_experts": statistics.num_experts,
        "experts_per_token": experts_per_token(model.config),
    }
    return SparsityReport(
        model=name,
        model_type=model.config.model_type,
        text=text,
        num_labels=num_labels,
        gate_zeros=statistics.zero_share("gate"),
        up_zeros=statistics.zero_share("up"),
        product_zeros=statistics.zero_share("product"),
        site_zeros=statistics.site_zero_shares(),
        weight_density=density,
        weight_zeros=measure_weight_zeros(model, density),
        integers=measure_integers(model, density),
        num_neurons=statistics.product_fired.numel(),
        dead_neurons=int(statistics.dead_neurons().sum()),
        always_on_neurons=int(statistics.always_on_neurons().sum()),
        loss=sum(counts.loss_sum for counts in by_source.values()) / num_labels,
        layers=layer_rows(statistics),
        sources=source_rows(by_source),
        positions=position_rows(statistics, model),
        firing_curves=firing_curves(statistics),
        engine=engine_section(statistics, consecutive, hidden_share(model.config)),
        active_parameters=active_parameters(
            parameters_by_part(model),
            expert_share=facts["experts_per_token"] / statistics.num_experts,
            gate_zeros=statistics.zero_share("gate"),
            product_zeros=statistics.zero_share("product"),
            hidden_share=hidden_share(model.config),
        ),
        definitions=definitions(**facts, dead_rate_bound=statistics.firing_rate_bound()),
        **facts,
    )


def as_against(report: SparsityReport) -> Against:
    """The part of a report that another model's report includes for comparison."""
    return Against(
        model=report.model,
        ffn_activation=report.ffn_activation,
        loss=report.loss,
        product_zeros=report.product_zeros,
        layers=[row.product_zeros or 0.0 for row in report.layer_rows],
        site_zeros=report.site_zeros,
        weight_density=report.weight_density,
        active_parameters=report.active_parameters,
        weight_zeros=report.weight_zeros,
        integers=report.integers,
        curves=report.curves,
    )
