"""The model that is evaluated: what identifies it, and how many parameters a token of it needs."""

from __future__ import annotations

import torch
import xxhash

from sparsify.evaluation.results import ActiveCount
from sparsify.models import SparseModel
from sparsify.sparsity.active_parameters import active_parameters, parameters_by_part


def model_hash(model: SparseModel) -> str:
    """Hash of a model's weights and activation: the same for the same function, wherever it was loaded from."""
    digest = xxhash.xxh3_128(model.config.ffn_activation.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().view(torch.uint8)
        digest.update(raw.numpy().data if raw.dim() else raw.reshape(1).numpy().data)
    return digest.hexdigest()


def zero_shares(totals: torch.Tensor) -> tuple[float | None, float | None]:
    """Shares of exact zeros of gate and product, from int64 [4]: values, fired gates, ups, products."""
    values, gate, _, product = totals.tolist()
    return (1 - gate / values, 1 - product / values) if values else (None, None)


def active_count(model: SparseModel, totals: torch.Tensor) -> ActiveCount:
    """Parameters that one token needs at the zeros that were counted."""
    gate, product = zero_shares(totals)
    config = model.config
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_local_experts", 1)
    parts = parameters_by_part(model)
    account = active_parameters(
        parts, expert_share=share, gate_zeros=gate or 0.0, product_zeros=product or 0.0
    )
    return ActiveCount(
        total=sum(parts.values()),
        perfect_predictor=account.perfect_predictor,
        gate_first=account.gate_first,
    )
