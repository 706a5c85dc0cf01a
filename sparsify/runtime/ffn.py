"""A gated feed-forward block for a few tokens, computed from the rows of the active neurons.

Exact (without a predictor): every gate row is read; up rows only where the gate factor is not zero; down rows only where the
product is kept. With a mask on the up factor, gate and up change places. Values equal the dense block's up to rounding, as skipped terms are exact zeros. With a predictor, only
rows predicted for at least one of the tokens are read, in all three projections.
"""

from __future__ import annotations

from typing import Literal

import torch

from sparsify.models.activations import Activation
from sparsify.runtime.build import kernels
from sparsify.runtime.native_ffn import MAX_TOKENS, NATIVE_DTYPES, native_ffn
from sparsify.runtime.torch_ffn import portable_ffn
from sparsify.runtime.triton_ffn import Routing, triton_can, triton_ffn
from sparsify.runtime.weights import FfnWeights, Predictor, RowsRead

Backend = Literal["auto", "native", "triton", "torch"]
THREAD_BYTES = 1 << 20


def sparse_ffn(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    *,
    up_input: torch.Tensor | None = None,
    predictor_input: torch.Tensor | None = None,
    dense: bool = False,
    backend: Backend = "auto",
    threads: int | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """Computes down_proj(activation(gate_proj(x), up_proj(x))).

    Args:
        x: Input of the block, [..., hidden].
        weights: Weights of the block on the device of x, of its dtype or in int8 or int4 blocks.
        activation: The two factors.
        up_input: What up_proj reads, of the shape of x; default: x.
        predictor_input: Input of the predictor, or of the router, of the shape of x; default: x.
        dense: Read every row: the baseline of speed-ups.
        backend: `native` (C++ on a CPU), `triton` (GPU), `torch` (torch's operators on any device), or `auto`, which is
            `backend_of(x)`.
        threads: Threads of the C++ kernel. Default: torch's number, but at most one for each THREAD_BYTES of gate rows. The
            result does not depend on it.
        counts: int64 [6] on the device of x, to which the Triton kernels add what they read: it stays where a CUDA graph writes.

    Returns:
        [..., hidden] of x's dtype, and the rows read. A row that several tokens need is read once for every eight tokens.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or the requested backend cannot be used.
    """
    weights.check(x)
    threads = threads or default_threads(weights)
    for name, other in (("predictor_input", predictor_input), ("up_input", up_input)):
        if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
            raise ValueError(f"{name} is {list(other.shape)}; it must be like x, {list(x.shape)}.")
    predictor_input = x if predictor_input is None else predictor_input
    for_up = None if up_input is None else up_input.reshape(-1, x.shape[-1])
    backend = _usable(backend, x, weights)
    tokens, seen = x.reshape(-1, x.shape[-1]), predictor_input.reshape(-1, x.shape[-1])
    parts, rows = [], RowsRead()
    for start in range(0, len(tokens), MAX_TOKENS):
        chunk = slice(start, start + MAX_TOKENS)
        given = (tokens[chunk], weights, activation, seen[chunk], dense)
        own_up = None if for_up is None else for_up[chunk]
        if backend == "native":
            part, read = native_ffn(*given, threads, up_x=own_up)
        elif backend == "triton":
            part, read = triton_ffn(*given, up_x=own_up, counts=counts)
        else:
            part, read = portable_ffn(*given, up_x=own_up)
        parts.append(part)
        rows += read
    return _joined(parts, tokens).view(x.shape), rows


def default_threads(weights: FfnWeights) -> int:
    """torch's number of threads, but at most one for each THREAD_BYTES of gate rows: synchronising costs time."""
    enough = weights.row_bytes * weights.neurons // THREAD_BYTES
    return max(1, min(torch.get_num_threads(), enough))


def sparse_experts(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    routing: Routing,
    *,
    up_input: torch.Tensor | None = None,
    predictor_input: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """All experts of a layer by the Triton kernels, without a synchronisation to learn which experts are used.

    Args:
        x: Input of the experts, [tokens, hidden], or of each of them, [experts, tokens, hidden].
        weights: Weights of all experts, with experts as the first dimension.
        activation: The two factors.
        routing: Experts of each token, and their shares.
        up_input: What up_proj reads, of either shape; default: x.
        predictor_input: [tokens, hidden]; needed if the weights have predictors.
        counts: As in `sparse_ffn`.

    Returns:
        [tokens, hidden] of x's dtype, and the rows read, as `sparse_ffn` counts them for each expert.
    """
    weights.check(x)
    _usable("triton", x, weights)
    tokens = len(routing.index)
    seen = x if predictor_input is None else predictor_input.reshape(tokens, -1)
    parts, rows = [], RowsRead()
    for start in range(0, tokens, MAX_TOKENS):
        chunk = slice(start, start + MAX_TOKENS)
        own = Routing(routing.index[chunk], routing.shares[chunk])
        own_up = None if up_input is None else up_input[..., chunk, :]
        given = (x[..., chunk, :], weights, activation, seen[..., chunk, :])
        part, read = triton_ffn(*given, routing=own, up_x=own_up, counts=counts)
        parts.append(part)
        rows += read
    return _joined(parts, x.new_empty(tokens, x.shape[-1])), rows


def _joined(parts: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return (parts[0] if len(parts) == 1 else torch.cat(parts or [x])).view(x.shape)


def backend_of(x: torch.Tensor, *, in_blocks: bool = False) -> Backend:
    """Backend for tensors of this kind on this machine: `triton` on a GPU unless weights are int8 or int4 blocks,
    `native` on a CPU, otherwise `torch`.
    """
    if triton_can(x) and not in_blocks:
        return "triton"
    return "native" if native_can(x) else "torch"


def _usable(backend: Backend, x: torch.Tensor, weights: FfnWeights) -> Backend:
    chosen = weights.copies is not None or weights.router is not None
    if backend == "auto":
        own = backend_of(x, in_blocks=weights.in_blocks)
        return "torch" if own == "triton" and (weights.masks or chosen) else own
    if backend == "triton" and (weights.in_blocks or weights.masks or chosen):
        raise ValueError(
            "The Triton kernels read no int8 or int4 blocks, mask neurons by thresholds on gate and inter alone, and know no routers."
        )
    needs = {
        "native": "a CPU, a C++ compiler or a wheel that contains them,",
        "triton": "a GPU, Triton",
    }
    can = {"native": native_can, "triton": triton_can}
    if backend in needs and not can[backend](x):
        raise ValueError(
            f"The kernels of the backend {backend!r} cannot be used for {x.dtype} on {x.device.type}: they need "
            f"{needs[backend]} and one of {', '.join(map(str, NATIVE_DTYPES))}."
        )
    return backend


def native_can(x: torch.Tensor) -> bool:
    """Whether the C++ kernel takes a tensor of this kind on this machine."""
    return x.device.type == "cpu" and x.dtype in NATIVE_DTYPES and kernels() is not None


__all__ = [
    "Backend",
    "FfnWeights",
    "Predictor",
    "Routing",
    "RowsRead",
    "backend_of",
    "native_can",
    "sparse_experts",
    "sparse_ffn",
]
