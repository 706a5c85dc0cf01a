"""A block, or all experts of a layer, by Triton on a GPU, or by its interpreter.

Get the kernels from `triton_kernels`, which checks that they compute correct values on this device.
"""

from __future__ import annotations

import contextlib
import functools
import os
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from sparsify.models.activations import ACTIVATIONS, Activation
from sparsify.runtime.torch_ffn import portable_ffn
from sparsify.runtime.weights import FfnWeights, Matrix, Predictor, RowsRead

TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNK = 128
"""Neurons of which one program builds a list."""
BLOCKS = {1: (8, 512), 2: (4, 512), 4: (4, 256), 8: (4, 128)}
"""By tokens: rows of a program, and columns that it reads at once. 4096 sums per program, so that they stay in registers;
not tuned on a GPU."""
NUM_WARPS = 4
SUM_BLOCK = (128, 32)
"""Chunks and columns that `sum_chunks` adds at once."""

WITHOUT = (
    "{reason} Sparse decoding on this GPU continues with torch's operators: the same values, but no faster than the dense model. "
    "Install Triton (pip install triton) for the kernels."
)


@dataclass(frozen=True)
class Routing:
    """Experts to which the tokens of a call are routed.

    Args:
        index: Expert of each slot, int64 [tokens, experts per token].
        shares: Weight of its output, [tokens, experts per token].
    """

    index: torch.Tensor
    shares: torch.Tensor


def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_can(x: torch.Tensor) -> bool:
    """Whether the Triton kernels take a tensor of this kind on this machine."""
    here = x.device.type == "cuda" or (x.device.type == "cpu" and interpreting())
    return here and x.dtype in TRITON_DTYPES and triton_kernels(x.device) is not None


@functools.cache
def triton_kernels(device: torch.device) -> ModuleType | None:
    """The kernels, after a test block gave correct values on this device; otherwise None, with one warning."""
    if find_spec("triton") is None:
        warnings.warn(WITHOUT.format(reason="There is no Triton here."), stacklevel=2)
        return None
    try:
        from sparsify.runtime import triton_kernels as kernels

        _check(kernels, device)
    except Exception as error:  # of Triton, of the compiler that it calls, or of the driver
        reason = f"The Triton kernels cannot be used: {str(error).strip()[-500:]}."
        warnings.warn(WITHOUT.format(reason=reason), stacklevel=2)
        return None
    return kernels


def _check(kernels: ModuleType, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, weights = normal(2, 24), FfnWeights(normal(40, 24), normal(40, 24), normal(40, 24))
    drelu = ACTIVATIONS["drelu"]
    given, _ = launch(kernels, x, weights, drelu, x, dense=False, routing=None)
    expected, _ = portable_ffn(x, weights, drelu, x)
    if not torch.allclose(given, expected, rtol=1e-3, atol=1e-2):
        raise ValueError("their values differ from torch's")


def triton_ffn(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    predictor_x: torch.Tensor,
    dense: bool = False,
    routing: Routing | None = None,
    up_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `sparse_ffn`, for x [tokens, hidden] of at most 8 tokens, already checked. The counts stay on the device.

    With a routing, all weights have experts as their first dimension, and the output is the weighted sum over the experts that a
    token is routed to. Only those are read.
    """
    kernels = triton_kernels(x.device)
    assert kernels is not None, "the kernels cannot be used; sparse_ffn chooses torch then"
    return launch(kernels, x, weights, activation, predictor_x, dense, routing, up_x)


def launch(
    kernels: ModuleType,
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    predictor_x: torch.Tensor,
    dense: bool,
    routing: Routing | None,
    up_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `triton_ffn`, with the kernels given."""
    by_rows = [_by_rows(weights, name) for name in ("gate", "up")]
    gate, up, down_t = (_experts(part, 3) for part in (*by_rows, weights.down_t))
    thresholds, gate_thresholds = weights.thresholds_for(x.device)
    (tokens, hidden), (experts, neurons, _) = x.shape, gate.shape
    x, predictor_x = _experts(x, 2), _experts(predictor_x, 2)
    for_up = x if up_x is None else _experts(up_x, 2)
    gate_constant, up_constant, down_constant = (
        None if one is None else one.contiguous() for one in weights.constants().values()
    )
    index = None if routing is None else routing.index.contiguous()
    slots = 1 if index is None else index.shape[1]
    padded = _power_of_two(tokens)
    rows, width = BLOCKS[padded]
    block = {
        "T": padded,
        "SLOTS": 0 if index is None else _power_of_two(slots),
        "ROWS": rows,
        "WIDTH": width,
        "num_warps": NUM_WARPS,
    }
    factors, product = x.new_zeros(2, experts, tokens, neurons, dtype=torch.float32)
    counts = torch.zeros(6, dtype=torch.int64, device=x.device)
    chunks, columns = -(-neurons // CHUNK), -(-hidden // width)
    partial = x.new_empty(experts, chunks, tokens, hidden, dtype=torch.float32)
    out = x.new_empty(tokens, hidden)
    sent, size = (index, tokens, slots), (hidden, neurons)
    listed = (chunks * CHUNK // rows, experts)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        wanted = None
        if weights.predictor is not None and not dense:
            wanted = _predict(kernels, predictor_x, weights.predictor, sent, factors, block)
        start: Any = kernels.gate_rows[listed]
        start(
            *(x, gate, factors if wanted is None else wanted, gate_thresholds, gate_constant, factors),
            *(counts, *sent, *size),
            *(x.stride(0), gate.stride(1), gate.stride(0), activation.gate_threshold),
            **{"KIND": activation.gate, "PREDICTED": wanted is not None, "CHUNK": CHUNK} | block,
            THRESHOLDS=gate_thresholds is not None,
            CONSTANT=gate_constant is not None,
        )
        start = kernels.up_rows[listed]
        start(
            *(for_up, up, factors, thresholds, up_constant, product, counts, *sent, *size),
            *(for_up.stride(0), up.stride(1), up.stride(0)),
            **{"DENSE": dense, "RELU": activation.up == "relu", "CHUNK": CHUNK} | block,
            THRESHOLDS=thresholds is not None,
            CONSTANT=up_constant is not None,
        )
        start = kernels.down_rows[chunks, columns, experts]
        start(
            *(product, down_t, partial, counts, *sent, *size, down_t.stride(1), down_t.stride(0)),
            **{"DENSE": dense, "CHUNK": CHUNK} | block,
        )
        at_once, width = SUM_BLOCK
        start = kernels.sum_chunks[-(-hidden // width), tokens]
        start(
            *(partial, out, index, None if routing is None else routing.shares.contiguous(), down_constant),
            *(tokens, slots, chunks, hidden),
            **{"SLOTS": block["SLOTS"], "CHUNKS": at_once, "WIDTH": width, "num_warps": NUM_WARPS},
            CONSTANT=down_constant is not None,
        )
    return out, RowsRead(counts=counts)


def _predict(
    kernels: ModuleType,
    x: torch.Tensor,
    predictor: Predictor,
    sent: tuple[torch.Tensor | None, int, int],
    like: torch.Tensor,
    block: dict[str, Any],
) -> torch.Tensor:
    """1 where a neuron is predicted for a token, otherwise 0; of the shape of `like`, undefined for tokens not routed to an
    expert.
    """
    a, b = _experts(predictor.a, 3), _experts(predictor.b, 3)
    experts, rank, _ = a.shape
    values = like.new_empty(experts, like.shape[1], rank)
    wanted = torch.empty_like(like)
    layers = (
        (x, (x.stride(0), 0), a, values, 0.0),
        (values, (rank, values.stride(0)), b, wanted, predictor.threshold),
    )
    for given, strides, weight, out, threshold in layers:
        _, rows, width = weight.shape
        start: Any = kernels.predictor_layer[-(-rows // block["ROWS"]), experts]
        start(
            *(given, weight, out, *sent, width, rows),
            *(*strides, weight.stride(1), weight.stride(0), threshold),
            **{"WANTED": out is wanted} | block,
        )
    return wanted


def _by_rows(weights: FfnWeights, name: str) -> Matrix:
    part = getattr(weights, name)
    return part.mT if name in weights.by_columns else part


def _experts(part: Matrix, dimensions: int) -> torch.Tensor:
    """Adds a dimension for experts, and makes the elements of a row adjacent."""
    assert isinstance(part, torch.Tensor), "sparse_ffn refuses blocks"
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part if part.ndim == dimensions else part[None]


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()
