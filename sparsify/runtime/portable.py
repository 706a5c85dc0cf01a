"""The same block by torch's operators: for devices and machines where no kernel of ours runs, and to check those that do."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from sparsify.runtime.activations import KernelActivation
from sparsify.runtime.weights import FfnWeights, RowsRead


def portable_ffn(
    x: torch.Tensor, weights: FfnWeights, activation: KernelActivation, dense: bool
) -> tuple[torch.Tensor, RowsRead]:
    """As `sparse_ffn`, for x [tokens, hidden]. Rows are gathered, which reads them, writes them and reads them again."""
    rows, wanted = _candidates(x, weights, dense)
    gate = activation.gate_factor(linear(x, weights.gate[rows]))
    gate = gate if wanted is None else torch.where(wanted, gate, 0.0)
    read = RowsRead(gate=gate.shape[1])
    if not dense:
        kept = (gate != 0).any(dim=0).nonzero().flatten()
        rows, gate = _narrow(rows, kept), gate[:, kept]
    up = activation.up_factor(linear(x, weights.up[rows]))
    product = gate * up if dense else torch.where(gate == 0, 0.0, gate * up)
    read.up = product.shape[1]
    if weights.thresholds is not None:
        small = product.abs() <= weights.thresholds[rows].to(x.device)
        product = torch.where(small, 0.0, product)
    if not dense:
        kept = (product != 0).any(dim=0).nonzero().flatten()
        rows, product = _narrow(rows, kept), product[:, kept]
    read.down = product.shape[1]
    return product @ weights.down_t[rows], read


Rows = torch.Tensor | slice


def _candidates(
    x: torch.Tensor, weights: FfnWeights, dense: bool
) -> tuple[Rows, torch.Tensor | None]:
    """The rows to look at, and for which tokens each is wanted: [tokens, rows], or None for all."""
    predictor = weights.predictor
    if predictor is None or dense:
        return slice(None), None
    scores = linear(linear(x, predictor.a).relu(), predictor.b)
    on = ~(scores <= predictor.threshold)
    rows = on.any(dim=0).nonzero().flatten()
    return rows, on[:, rows]


def _narrow(rows: Rows, kept: torch.Tensor) -> torch.Tensor:
    return kept if isinstance(rows, slice) else rows[kept]
