"""A gated feed-forward block for a few tokens, computed from the rows of the neurons that count.

Exact (without a predictor): every gate row is read; up rows only where the gate factor is not zero; down rows only where the
product is kept. Values equal the dense block's to rounding, as skipped terms are exact zeros. With a predictor, only rows
that it predicts for at least one of the tokens are read, in all three projections.
"""

from __future__ import annotations

from typing import Literal

import torch

from sparsify.runtime.activations import KernelActivation
from sparsify.runtime.build import kernels
from sparsify.runtime.native_ffn import MAX_TOKENS, NATIVE_DTYPES, native_ffn
from sparsify.runtime.portable import portable_ffn
from sparsify.runtime.weights import FfnWeights, Predictor, RowsRead

Backend = Literal["auto", "native", "torch"]
THREAD_BYTES = 1 << 20


def sparse_ffn(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: KernelActivation,
    *,
    predictor_input: torch.Tensor | None = None,
    dense: bool = False,
    backend: Backend = "auto",
    threads: int | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """Computes down_proj(activation(gate_proj(x), up_proj(x))).

    Args:
        x: Input of the block, [..., hidden].
        weights: Weights of the block on the device of x, of its dtype or in int8 or int4 blocks.
        activation: The two factors.
        predictor_input: What the predictor looks at, of the shape of x; x itself unless given.
        dense: Read every row: the control that a speed-up is measured against.
        backend: `native` is the C++ kernel, `torch` the same by torch's operators on any device, `auto` the first
            where it can be used.
        threads: Of the C++ kernel. Unless given, torch's own number, but no more than have THREAD_BYTES of gate rows to
            read each. The result does not depend on it.

    Returns:
        [..., hidden] of x's dtype, and how many rows were read. Rows that several tokens want are read once for each
        eight tokens.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit, or `native` is asked for and cannot be used.
    """
    weights.check(x)
    threads = threads or default_threads(weights)
    if predictor_input is None:
        predictor_input = x
    elif predictor_input.shape != x.shape or predictor_input.dtype != x.dtype:
        raise ValueError(
            f"predictor_input is {list(predictor_input.shape)}; it must be like x, {list(x.shape)}."
        )
    if backend == "auto":
        backend = "native" if native_can(x) else "torch"
    elif backend == "native" and not native_can(x):
        raise ValueError(
            f"The C++ kernel cannot be used for {x.dtype} on {x.device.type}: it needs a CPU, a C++ compiler "
            f"or a wheel that brings the kernels, and one of {', '.join(map(str, NATIVE_DTYPES))}."
        )
    tokens, seen = x.reshape(-1, x.shape[-1]), predictor_input.reshape(-1, x.shape[-1])
    out, rows = torch.empty_like(tokens, memory_format=torch.contiguous_format), RowsRead()
    for start in range(0, len(tokens), MAX_TOKENS):
        chunk = slice(start, start + MAX_TOKENS)
        given = (tokens[chunk], weights, activation, seen[chunk], dense)
        if backend == "native":
            out[chunk], read = native_ffn(*given, threads)
        else:
            out[chunk], read = portable_ffn(*given)
        rows += read
    return out.view(x.shape), rows


def default_threads(weights: FfnWeights) -> int:
    """As many as torch has, as long as each has enough to do: waiting for each other costs time, too."""
    enough = weights.row_bytes * weights.gate.shape[0] // THREAD_BYTES
    return max(1, min(torch.get_num_threads(), enough))


def native_can(x: torch.Tensor) -> bool:
    """Whether the C++ kernel takes a tensor of this kind on this machine."""
    return x.device.type == "cpu" and x.dtype in NATIVE_DTYPES and kernels() is not None


__all__ = ["Backend", "FfnWeights", "Predictor", "RowsRead", "native_can", "sparse_ffn"]
