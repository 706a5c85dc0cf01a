"""The block by torch's operators: the reference of the kernels, and the fallback where they cannot run."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from sparsify.models.activations import Activation
from sparsify.models.ffn_activation import GATE_FACTORS, UP_FACTORS
from sparsify.models.masking import largest
from sparsify.models.quantised import product, rounded_states
from sparsify.runtime.weights import Copies, FfnWeights, Matrix, Router, RowsRead

GATHER_SHARE = 0.2
"""Largest share of rows to gather. Gathering reads, writes and reads them again, so above this the whole matrix is
multiplied."""

Rows = torch.Tensor | slice
ALL_ROWS = slice(None)


def portable_ffn(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    predictor_x: torch.Tensor,
    dense: bool = False,
    up_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `sparse_ffn`, for x [tokens, hidden]. With weights in blocks it computes in fp32 at least."""
    dtype = x.dtype
    wanted = None if weights.copies is None else _ranked(x, weights.copies, activation)
    if weights.router is not None:
        wanted = _routed(predictor_x, weights.router, weights.neurons)
    x, own = _read_as(x, weights)
    for_up, own_for_up = (x, own) if up_x is None else _read_as(up_x, weights)
    rows: Rows = ALL_ROWS
    if weights.predictor is not None and not dense:
        wanted = _predicted(predictor_x, weights)
    if wanted is not None and not dense:
        rows = _few(wanted, rows)
        wanted = wanted[:, rows]
    thresholds, gate_thresholds = weights.thresholds_for(x.device)
    halves = {"gate": (x, own, weights.gate_constant), "up": (for_up, own_for_up, weights.up_constant)}
    columns = dict.fromkeys(halves, 0)

    def factor(name: str, rows: Rows) -> torch.Tensor:
        """Factors of the selected neurons before their mask."""
        states, own_states, constant = halves[name]
        matrix = getattr(weights, name)
        if name in weights.by_columns:
            outputs, columns[name] = _column_sums(own_states, matrix, dense)
            outputs = outputs[:, rows]
        else:
            outputs = linear(states, _rows(matrix, rows, x))
        outputs = _with_constant(outputs, constant, rows)
        if name == "up":
            return UP_FACTORS[activation.up](outputs)
        return GATE_FACTORS[activation.gate](outputs, activation.gate_threshold)

    def masked(name: str, values: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The values, zero where they are dropped; neurons that were not computed are dropped, whatever their values."""
        limits = {"gate": gate_thresholds, "inter": thresholds}.get(name)
        if limits is not None:
            return torch.where(values.abs() <= limits[rows], 0.0, values)
        mask = weights.masks.get(name)
        if mask is None:
            return values
        whole = values.new_zeros(len(values), weights.neurons)
        whole[:, rows] = values
        return mask(whole)[:, rows]

    first, second = ("up", "gate") if weights.up_first else ("gate", "up")
    value = factor(first, rows)
    value = masked(first, value if wanted is None else torch.where(wanted, value, 0.0), rows)
    read = {first: value.shape[1]}
    # A mask that compares the second factors must see all of them.
    compares = second in weights.masks and weights.masks[second].rule.rule != "threshold"
    if not dense and not compares:
        kept = _few(value != 0, rows)
        rows, value = _narrow(rows, kept), value[:, kept]
        wanted = None if wanted is None else wanted[:, kept]
    other = factor(second, rows)
    other = masked(second, other if wanted is None else torch.where(wanted, other, 0.0), rows)
    product = value * other if dense else torch.where(value == 0, 0.0, value * other)
    product = masked("inter", product, rows)
    read[second] = product.shape[1]
    if not dense:
        kept = _few(product != 0, rows)
        rows, product = _narrow(rows, kept), product[:, kept]
    gate_rows, up_rows = (0 if name in weights.by_columns else read[name] for name in ("gate", "up"))
    counts = RowsRead(
        *(gate_rows, up_rows, product.shape[1]),
        offered=weights.neurons,
        gate_columns=columns["gate"],
        up_columns=columns["up"],
    )
    output = _with_constant(product @ _rows(weights.down_t, rows, x), weights.down_constant, ALL_ROWS)
    return output.to(dtype), counts


def _read_as(x: torch.Tensor, weights: FfnWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """An input as products with rows read it, and as sums of columns do."""
    if not weights.rounds_states:
        return x, x
    own = x.to(torch.promote_types(x.dtype, torch.float32))
    return rounded_states(x).to(own.dtype), own


def _with_constant(outputs: torch.Tensor, constant: torch.Tensor | None, rows: Rows) -> torch.Tensor:
    return outputs if constant is None else outputs + constant[rows].to(outputs.dtype)


def _rows(matrix: Matrix, rows: Rows, x: torch.Tensor) -> torch.Tensor:
    """The selected rows, in x's dtype."""
    return matrix[rows] if isinstance(matrix, torch.Tensor) else matrix.dequantised(rows, x.dtype)


def _column_sums(x: torch.Tensor, matrix: Matrix, dense: bool) -> tuple[torch.Tensor, int]:
    """The product of x [tokens, inputs] and a matrix [inputs, outputs], and how many of its lines were read."""
    kept = ALL_ROWS if dense else _few(x != 0, ALL_ROWS)
    seen = x[:, kept]
    return seen @ _rows(matrix, kept, x), seen.shape[1]


def _predicted(x: torch.Tensor, weights: FfnWeights) -> torch.Tensor:
    """Neurons predicted for each token, bool [tokens, neurons]; a NaN score counts as predicted."""
    assert weights.predictor is not None
    values = x
    for part, last in ((weights.predictor.a, False), (weights.predictor.b, True)):
        in_blocks = not isinstance(part, torch.Tensor)
        values = product(values.float(), part, by_columns=False) if in_blocks else linear(values, part)
        values = values if last else values.relu()
    return ~(values <= weights.predictor.threshold)


def _ranked(x: torch.Tensor, copies: Copies, activation: Activation) -> torch.Tensor:
    """The same by int4 copies."""
    gate, up = (product(x, one, by_columns=False) for one in (copies.gate, copies.up))
    factors = GATE_FACTORS[activation.gate](gate, activation.gate_threshold), UP_FACTORS[activation.up](up)
    return ~((factors[0] * factors[1]).abs() <= copies.threshold)


def _routed(x: torch.Tensor, router: Router, neurons: int) -> torch.Tensor:
    """The same by a router of groups, whose scores are computed in fp32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    scores = linear(x.to(wide), router.weight.to(wide), router.bias.to(wide))
    kept = ~(scores <= 0) if router.kept is None else largest(scores, router.kept) | scores.isnan()
    return kept.repeat_interleave(neurons // len(router.weight), dim=1)


def _few(wanted: torch.Tensor, rows: Rows) -> Rows:
    """Columns that any token needs, or all if gathering their rows would cost more than it saves."""
    kept = wanted.any(dim=0).nonzero().flatten()
    gathered = isinstance(rows, torch.Tensor)  # these rows are copied in any case
    return kept if gathered or len(kept) <= GATHER_SHARE * wanted.shape[1] else ALL_ROWS


def _narrow(rows: Rows, kept: Rows) -> Rows:
    return kept if isinstance(rows, slice) else rows[kept]
