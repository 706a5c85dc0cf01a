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
MASK_WARPS = 8
"""Of the kernels that compute sums, and of that which holds a whole token."""
SUM_BLOCK = (128, 32)
"""Chunks and columns that `sum_chunks` and the like add at once."""
COUNTS = ("offered", "gate", "up", "down", "gate_columns", "up_columns")
"""What is counted, in the order of `RowsRead`."""

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
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `sparse_ffn`, for x [tokens, hidden] of at most 8 tokens, already checked. The counts stay on the device. If `counts`, int64 [6], is
    given, they are added to it, and not returned.

    With a routing, all weights have experts as their first dimension, and the output is the weighted sum over the experts that a
    token is routed to. Only those are read. x and up_x may be inputs of each expert, [experts, tokens, hidden].
    """
    kernels = triton_kernels(x.device)
    assert kernels is not None, "the kernels cannot be used; sparse_ffn chooses torch then"
    return launch(kernels, x, weights, activation, predictor_x, dense, routing, up_x, counts)


def launch(
    kernels: Any,
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    predictor_x: torch.Tensor,
    dense: bool,
    routing: Routing | None,
    up_x: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `triton_ffn`, with the kernels given."""
    gate, up, down_t = (_experts(part, 3) for part in (weights.gate, weights.up, weights.down_t))
    thresholds, gate_thresholds = weights.thresholds_for(x.device)
    (tokens, hidden), (experts, neurons, _) = x.shape[-2:], down_t.shape
    x, predictor_x = _experts(x, 3), _experts(predictor_x, 2)
    for_up = x if up_x is None else _experts(up_x, 3)
    gate_constant, up_constant, down_constant = (
        None if one is None else one.contiguous() for one in weights.constants().values()
    )
    index = None if routing is None else routing.index.contiguous()
    slots = 1 if index is None else index.shape[1]
    padded = power_of_two(tokens)
    rows, width = BLOCKS[padded]
    block = {
        "T": padded,
        "SLOTS": 0 if index is None else power_of_two(slots),
        "ROWS": rows,
        "WIDTH": width,
        "num_warps": NUM_WARPS,
    }
    factors, product = x.new_zeros(2, experts, tokens, neurons, dtype=torch.float32)
    to = torch.zeros(6, dtype=torch.int64, device=x.device) if counts is None else counts
    out = x.new_empty(tokens, hidden)
    sent, size = (index, tokens, slots), (hidden, neurons)
    listed = (-(-neurons // CHUNK) * CHUNK // rows, experts)
    sums = {"SLOTS": block["SLOTS"], "CHUNKS": SUM_BLOCK[0], "WIDTH": SUM_BLOCK[1], "num_warps": NUM_WARPS}

    def added(values: torch.Tensor, weight: torch.Tensor, place: str) -> tuple[torch.Tensor, int]:
        """Sums over the chunks of a weight's lines, for `sum_chunks` and the like, and the number of chunks."""
        return add_rows(kernels, values, weight, sent, block, to, COUNTS.index(place), dense)

    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        wanted = None
        if weights.predictor is not None and not dense:
            wanted = _predict(kernels, predictor_x, weights.predictor, sent, factors, block)
        seen = factors if wanted is None else wanted
        options: dict[str, Any] = {"KIND": activation.gate, "PREDICTED": wanted is not None}
        options |= {"THRESHOLDS": gate_thresholds is not None, "CONSTANT": gate_constant is not None}
        if "gate" in weights.by_columns:
            partial, chunks = added(x, gate, "gate_columns")
            kernels.gate_sums[-(-neurons // SUM_BLOCK[1]), tokens, experts](
                *(partial, seen, gate_thresholds, gate_constant, factors, *sent, chunks, neurons),
                *(activation.gate_threshold,),
                **options | sums,
            )
        else:
            kernels.gate_rows[listed](
                *(x, gate, seen, gate_thresholds, gate_constant, factors, to, *sent, *size),
                *(*_strides(x), gate.stride(1), gate.stride(0), activation.gate_threshold),
                **options | {"CHUNK": CHUNK} | block,
            )
        options = {"DENSE": dense, "RELU": activation.up == "relu"}
        options |= {"THRESHOLDS": thresholds is not None, "CONSTANT": up_constant is not None}
        if "up" in weights.by_columns:
            partial, chunks = added(for_up, up, "up_columns")
            kernels.up_sums[-(-neurons // SUM_BLOCK[1]), tokens, experts](
                *(partial, factors, thresholds, up_constant, product, *sent, chunks, neurons),
                **options | sums,
            )
        else:
            kernels.up_rows[listed](
                *(for_up, up, factors, thresholds, up_constant, product, to, *sent, *size),
                *(*_strides(for_up), up.stride(1), up.stride(0)),
                **options | {"CHUNK": CHUNK} | block,
            )
        partial, chunks = added(product, down_t, "down")
        kernels.sum_chunks[-(-hidden // SUM_BLOCK[1]), tokens](
            *(partial, out, index, None if routing is None else routing.shares.contiguous(), down_constant),
            *(tokens, slots, chunks, hidden),
            **sums,
            CONSTANT=down_constant is not None,
        )
    return out, RowsRead(counts=to if counts is None else None)


def add_rows(
    kernels: Any,
    values: torch.Tensor,
    weight: torch.Tensor,
    sent: tuple[torch.Tensor | None, int, int],
    block: dict[str, Any],
    counts: torch.Tensor,
    place: int,
    dense: bool,
) -> tuple[torch.Tensor, int]:
    """values [experts or 1, tokens, lines] @ weight [experts, lines, width], by chunks of lines: [experts, chunks, tokens, width]
    fp32, and the number of chunks. `place` is the index of `counts` at which the lines read are counted.
    """
    experts, lines, width = weight.shape
    chunks, tokens = -(-lines // CHUNK), values.shape[1]
    partial = values.new_empty(experts, chunks, tokens, width, dtype=torch.float32)
    kernels.add_rows[chunks, -(-width // block["WIDTH"]), experts](
        *(values, weight, partial, counts, *sent, width, lines),
        *(*_strides(values), weight.stride(1), weight.stride(0)),
        **{"COUNT": place, "DENSE": dense, "CHUNK": CHUNK} | block,
    )
    return partial, chunks


def _strides(values: torch.Tensor) -> tuple[int, int]:
    """From one token to the next, and from one expert to the next: 0 where all read the same."""
    return values.stride(1), values.stride(0) if len(values) > 1 else 0


def _predict(
    kernels: Any,
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
        kernels.predictor_layer[-(-rows // block["ROWS"]), experts](
            *(given, weight, out, *sent, width, rows),
            *(*strides, weight.stride(1), weight.stride(0), threshold),
            **{"WANTED": out is wanted} | block,
        )
    return wanted


def _experts(part: Matrix, dimensions: int) -> torch.Tensor:
    """Adds a first dimension for experts, and makes the elements of a row adjacent."""
    assert isinstance(part, torch.Tensor), "sparse_ffn refuses blocks"
    part = part if part.stride(-1) == 1 else part.contiguous()
    return part if part.ndim == dimensions else part[None]


def power_of_two(count: int) -> int:
    """The smallest that is not smaller."""
    return 1 << (count - 1).bit_length()
