"""From counts to the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from sparsify.models import SparseModel
from sparsify.sparsity.active_parameters import ffn_byte_shares
from sparsify.sparsity.consecutive import CHUNK_TOKENS, ConsecutiveStatistics
from sparsify.sparsity.schema import ChunkRow, Engine, LayerRow, PositionRow, SourceRow
from sparsify.sparsity.statistics import POSITION_STARTS, ActivationStatistics

CURVE_POINTS = 101


def known(share: float) -> float | None:
    """NaN says that nothing was counted; JSON says it by null."""
    return None if math.isnan(share) else share


def layer_rows(statistics: ActivationStatistics) -> list[LayerRow]:
    """One row a layer; in a mixture of experts followed by one row for each of its experts."""
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
    )


@dataclass
class SourceCounts:
    """What one source of the text has had so far.

    Attributes:
        values: [layers, 4]: values computed, and those of the gate, up and product that were not zero.
    """

    loss_sum: float = 0.0
    num_tokens: int = 0
    num_labels: int = 0
    values: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 4, dtype=torch.int64))


def source_rows(sources: Mapping[str, SourceCounts]) -> list[SourceRow]:
    """One row a source, in the order of the text."""
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
    """Zeros by position in the document; experts count with the tokens that they computed."""
    per_token = getattr(model.config, "num_experts_per_tok", 1)
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
    """Firing rates of each layer, hottest neuron first; those of experts without tokens are 0.

    Returns:
        [layers, experts * neurons].
    """
    rates = statistics.firing_rates().nan_to_num(0.0).flatten(1)
    return rates.sort(dim=1, descending=True).values.numpy()


def firing_curves(statistics: ActivationStatistics) -> list[list[float]]:
    """`sorted_firing_rates` at even steps, [layers][at most CURVE_POINTS]."""
    rates = sorted_firing_rates(statistics)
    at = np.unique(np.linspace(0, rates.shape[1] - 1, CURVE_POINTS).round().astype(int))
    return rates[:, at].tolist()


def engine_section(statistics: ActivationStatistics, consecutive: ConsecutiveStatistics) -> Engine:
    """What an engine would feel."""
    unions = consecutive.chunk_unions(statistics.num_experts * statistics.num_neurons)
    gap, independent = consecutive.coactivation_gap()
    gate_first, perfect = ffn_byte_shares(
        statistics.zero_share("gate"), statistics.zero_share("product")
    )
    return Engine(
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
        gate_first_ffn_bytes=gate_first,
        perfect_predictor_ffn_bytes=perfect,
    )
