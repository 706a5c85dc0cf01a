"""The part of a report on sparse weights: zeros by matrix, and what they save next to the zeros of activations."""

from __future__ import annotations

from sparsify.conversion.weight_zeros import PROJECTIONS, count_zeros, live_reader, weight_sparsity
from sparsify.models import SparseModel
from sparsify.models.masking import experts_per_token, num_experts
from sparsify.reporting.numbers import percent
from sparsify.reporting.tables import Table
from sparsify.sparsity.schema import MatrixRow, WeightZeros

WEIGHT_BYTES = 2
"""Of a weight in bf16."""
MASK_BYTES = 1 / 8
"""One bit says of each weight whether it is stored."""
FFN = ("gate_proj", "up_proj", "down_proj")


def measure_weight_zeros(model: SparseModel, weight_density: float) -> WeightZeros | None:
    """Counts the zeros of a model whose weights are sparse; None for any other.

    Args:
        model: Its weights are counted.
        weight_density: Share of the weights that a token reads under the zeros of activations. Both kinds of zeros are taken as
            independent.
    """
    stored, config = weight_sparsity(model.config), model.config
    if stored is None:
        return None
    matrices = list(count_zeros(config, live_reader(model)))
    of_token = experts_per_token(config) / num_experts(config)
    dense = compressed = 0.0
    for one in matrices:
        weights = one.weights * (of_token if one.projection in FFN else 1)
        dense += WEIGHT_BYTES * weights
        compressed += (MASK_BYTES + WEIGHT_BYTES * (1 - one.share)) * weights
    return WeightZeros(
        method=stored.method,
        pattern=stored.pattern,
        sparsity=stored.sparsity,
        zeros=sum(one.zeros for one in matrices) / sum(one.weights for one in matrices),
        matrices=[MatrixRow(layer=one.layer, projection=one.projection, zeros=one.share) for one in matrices],
        dense_bytes=round(dense),
        activation_bytes=round(weight_density * dense),
        weight_bytes=round(compressed),
        both_bytes=round(weight_density * compressed),
    )


def weight_zeros_table(zeros: WeightZeros) -> Table:
    """Zeros of each matrix, by layer."""
    pattern = "" if zeros.pattern == "unstructured" else f", {zeros.pattern}"
    table = Table(f"Weights that are exactly zero, by {zeros.method}{pattern}", ["layer", *PROJECTIONS])
    shares = {(row.layer, row.projection): row.zeros for row in zeros.matrices}
    for layer in sorted({row.layer for row in zeros.matrices}):
        table.add(str(layer), *(percent(shares[layer, projection]) for projection in PROJECTIONS))
    return table


def bytes_table(zeros: WeightZeros) -> Table:
    """What a token reads of the linear projections, without and with each kind of zeros."""
    table = Table("Bytes of the linear projections that a token reads, in bf16", ["", "MB", "of dense"])
    for name, count in (
        ("dense", zeros.dense_bytes),
        ("zeros of activations", zeros.activation_bytes),
        ("zeros of weights, one bit for each weight", zeros.weight_bytes),
        ("both", zeros.both_bytes),
    ):
        table.add(name, f"{count / 1e6:,.1f}", percent(count / zeros.dense_bytes))
    return table
