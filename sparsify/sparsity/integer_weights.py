"""The part of a report on integer weights: what they are, and the bytes of the linear projections that a token reads."""

from __future__ import annotations

from sparsify.models import SparseModel
from sparsify.models.integer_linear import PROJECTIONS, IntegerLinear, quantisation
from sparsify.models.masking import experts_per_token, projection_shapes
from sparsify.reporting.numbers import percent
from sparsify.reporting.tables import Table
from sparsify.sparsity.schema import IntegerWeights
from sparsify.sparsity.sparse_weights import FFN, WEIGHT_BYTES


def projection_bytes(model: SparseModel) -> tuple[int, int]:
    """Bytes of the linear projections that a token reads if no activation is zero: as they are, integers with their scales and all
    others in bf16, and all in bf16.
    """
    config = model.config
    experts = experts_per_token(config)
    times = {name: experts if name in FFN else 1 for name in PROJECTIONS}
    shapes = projection_shapes(config)
    dense = (
        config.num_hidden_layers
        * WEIGHT_BYTES
        * sum(times[one] * outputs * inputs for one, (outputs, inputs) in shapes.items())
    )
    integers = [one for one in model.modules() if isinstance(one, IntegerLinear)]
    own = sum(one.weight_codes.nbytes + one.weight_scales.nbytes for one in integers)
    return (own if integers else dense), dense


def measure_integers(model: SparseModel, weight_density: float) -> IntegerWeights | None:
    """What a model's integers are; None for one of numbers.

    Args:
        model: Its bytes are counted.
        weight_density: Share of the weights that a token reads under the zeros of activations.
    """
    stored = quantisation(model.config)
    if stored is None:
        return None
    own, dense = projection_bytes(model)
    return IntegerWeights(
        words=stored.words,
        weight_bits=stored.weight_bits,
        activation_bits=stored.activation_bits,
        dense_bytes=dense,
        activation_bytes=round(weight_density * dense),
        integer_bytes=own,
        both_bytes=round(weight_density * own),
    )


def integers_table(integers: IntegerWeights) -> Table:
    """What a token reads of the linear projections, with and without integers and zeros of activations."""
    table = Table(f"Bytes of the linear projections that a token reads; {integers.words}", ["", "MB", "of bf16"])
    for name, count in (
        ("bf16", integers.dense_bytes),
        ("bf16, with the zeros of activations", integers.activation_bytes),
        ("integers and their scales", integers.integer_bytes),
        ("both", integers.both_bytes),
    ):
        table.add(name, f"{count / 1e6:,.2f}", percent(count / integers.dense_bytes))
    return table
