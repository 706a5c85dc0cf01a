"""Products with quantised projections as whole numbers: rounded activations times the codes of weights (native/integer.cpp).

The values are those of the simulated arithmetic (`models/integer_linear.py`) up to the rounding of fp32: sums within a group of channels are
exact. What is rounded to 16 bits, and a token that is smoothed by itself, are multiplied as numbers of 21 bits, of their largest.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from sparsify.models.hadamard import core_order, paley
from sparsify.models.integer_linear import WEIGHT_BITS
from sparsify.runtime.build import load

THREAD_BYTES = 1 << 19
"""A product has one thread for each THREAD_BYTES of weights, at most torch's number: synchronising costs time."""


class _Call(ctypes.Structure):
    """Mirrors IntegerCall in native/integer.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "tiles", "scales", "out")),
        *((name, ctypes.c_int64) for name in ("tokens", "inputs", "outputs", "smooth_group")),
        *((name, ctypes.c_int32) for name in ("weight_bits", "activation_bits", "threads", "apart")),
    )


@functools.cache
def integer_kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None, with one warning, where there are none."""
    library = load("integers")
    if library is not None:
        assert library.sparsify_integer_call_bytes() == ctypes.sizeof(_Call)
        library.sparsify_integer_tile_bytes.restype = ctypes.c_int64
        library.sparsify_integer_tile_bytes.argtypes = (ctypes.c_int64, ctypes.c_int)
        library.sparsify_integer_pack.argtypes = (
            *(ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64),
            *(ctypes.c_int, ctypes.c_void_p),
        )
        library.sparsify_integer_turn.argtypes = (
            ctypes.c_void_p,
            *(ctypes.c_int64 for _ in range(4)),
            *(ctypes.c_void_p, ctypes.c_int),
        )
    return library


@dataclass(frozen=True)
class TiledMatrix:
    """Codes of a matrix as the kernels of this processor read them: 32 rows are interleaved, and padded with zeros.

    Args:
        tiles: uint8 [bytes].
        scales: fp32 [outputs].
        shape: Outputs and inputs.
        bits: Of a weight, 4 or 8.
    """

    tiles: torch.Tensor
    scales: torch.Tensor
    shape: tuple[int, int]
    bits: int

    @property
    def nbytes(self) -> int:
        return self.tiles.nbytes + self.scales.nbytes


def tiled(codes: torch.Tensor, scales: torch.Tensor, bits: int) -> TiledMatrix:
    """Packs codes for the kernels.

    Args:
        codes: int8 [outputs, inputs] on a CPU, -8 to 7 if of 4 bits.
        scales: [outputs].
        bits: 4 or 8.

    Raises:
        ValueError: For other bits, shapes or dtypes.
    """
    if bits not in WEIGHT_BITS or codes.dtype != torch.int8 or codes.dim() != 2 or scales.shape != codes.shape[:1]:
        raise ValueError(
            f"{bits} bits, codes {codes.dtype} {list(codes.shape)}, scales {list(scales.shape)} do not fit."
        )
    library = integer_kernels()
    assert library is not None, "the caller checks integer_kernels"
    outputs, inputs = codes.shape
    codes = codes.contiguous()
    tiles = torch.zeros(-(-outputs // 32) * library.sparsify_integer_tile_bytes(inputs, bits), dtype=torch.uint8)
    library.sparsify_integer_pack(codes.data_ptr(), outputs, inputs, bits, tiles.data_ptr())
    return TiledMatrix(tiles, scales.detach().float().contiguous(), (outputs, inputs), bits)


def integer_product(
    x: torch.Tensor,
    matrix: TiledMatrix,
    activation_bits: int,
    *,
    smooth_group: int | None = None,
    apart: bool = False,
    threads: int | None = None,
) -> torch.Tensor:
    """The outputs of a quantised projection. Of a token that is not finite they are NaN; with smoothing, those of all tokens with it.

    Args:
        x: [tokens, inputs], the tokens of one sequence.
        matrix: Its weights.
        activation_bits: 2 to 8; each token is rounded symmetrically, to multiples of max |x| / (2^(bits - 1) - 1). 16: not rounded.
        smooth_group: Channels that share a runtime scale (arXiv 2409.20361), sorted by their largest |x|; None without.
        apart: Whether each token is a sequence of its own.
        threads: Default: one for each THREAD_BYTES of weights, at most torch's number. The result does not depend on it.

    Returns:
        fp32 [tokens, outputs].

    Raises:
        ValueError: If shapes or bits do not fit.
    """
    outputs, inputs = matrix.shape
    if x.dim() != 2 or x.shape[1] != inputs:
        raise ValueError(f"x is {list(x.shape)}; it must be [tokens, {inputs}].")
    if not (2 <= activation_bits <= 8 or activation_bits == 16):
        raise ValueError(f"activation_bits is {activation_bits}; allowed: 2 to 8, 16.")
    library = integer_kernels()
    assert library is not None, "the caller checks integer_kernels"
    x = x.detach().float().contiguous()
    out = torch.empty(len(x), outputs)
    call = _Call(
        *(x.data_ptr(), matrix.tiles.data_ptr(), matrix.scales.data_ptr(), out.data_ptr()),
        *(len(x), inputs, outputs, smooth_group or 0, matrix.bits, activation_bits),
        threads=threads or max(1, min(torch.get_num_threads(), matrix.nbytes // THREAD_BYTES)),
        apart=apart,
    )
    error = library.sparsify_integer_product(ctypes.byref(call))
    assert error == 0, f"sparsify_integer_product refused its arguments: {error}"
    return out


def turned(x: torch.Tensor, parts: int) -> torch.Tensor:
    """As `IntegerLinear.turn`: x [rows, inputs] in fp32, of which so many equal parts are mixed by a Hadamard matrix of that size.

    Raises:
        ValueError: If there is none of that size.
    """
    core = core_order(parts)
    if core is None:
        raise ValueError(f"there is no Hadamard matrix of size {parts} here")
    library = integer_kernels()
    assert library is not None, "the caller checks integer_kernels"
    values = x.detach().float().contiguous().clone()
    matrix = paley(core).float() if core > 1 else values.new_ones(1)
    threads = min(torch.get_num_threads(), len(values))
    sizes = (len(values), core, parts // core, values.shape[1] // parts)
    library.sparsify_integer_turn(values.data_ptr(), *sizes, matrix.data_ptr(), threads)
    return values
