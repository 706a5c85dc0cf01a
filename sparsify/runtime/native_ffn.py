"""Calls the C++ kernel with the addresses and strides of tensors."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import Any

import torch

from sparsify.errors import ModelError
from sparsify.models.activations import Activation, GateKind, UpKind
from sparsify.models.masking import kept_count
from sparsify.runtime.build import kernels, load_formats
from sparsify.runtime.packed import PackedMatrix
from sparsify.runtime.weights import FfnWeights, Matrix, RowsRead

MAX_TOKENS = 8
"""Largest number of tokens of one call; equals MAX_TOKENS in native/rows.h."""

NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GATE_KINDS: dict[GateKind, int] = {
    "relu": 0,
    "fatrelu": 0,  # relu with a gate threshold
    "relu_squared": 1,
    "shifted_relu": 2,
    "silu": 3,
    "gelu_tanh": 4,
}
_UP_KINDS: dict[UpKind, int] = {"identity": 0, "relu": 1}
STORED_FORMATS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""Names of formats of weights that are stored in a dtype, of `build.FORMATS`."""
_FORMATS = {"int8": 1, "int4": 2, "packed_bf16": 3, "packed_int8": 4, "packed_int4": 5}

COUNTS = ("offered", "gate_rows", "up_rows", "down_rows", "gate_columns", "up_columns")

THRESHOLD, TOP_K, TOP_P = range(3)


class CMatrix(ctypes.Structure):
    """Mirrors Matrix in native/lanes.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("factors", ctypes.c_void_p),
    )


class CMask(ctypes.Structure):
    """How the elements of a site are masked; mirrors SiteMask in native/masks.h."""

    _fields_ = (
        ("thresholds", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("basis", CMatrix),
        ("kept", ctypes.c_int64),
        ("mass", ctypes.c_float),
        ("rule", ctypes.c_int32),
    )


class CLowRank(ctypes.Structure):
    """What replaces the elements that a projection's mask dropped; mirrors LowRank in native/low_rank.h."""

    _fields_ = (("left", CMatrix), ("right", CMatrix), ("rank", ctypes.c_int64))


class FfnCall(ctypes.Structure):
    """Arguments and results of a call; mirrors FfnCall in native/ffn.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "neurons", "rank", "groups", "kept_groups")),
        *((name, CMatrix) for name in ("x", "up_x", "gate", "up", "down_t")),
        *((name, CMatrix) for name in ("predictor_x", "predictor_a", "predictor_b", "gate_copy", "up_copy")),
        ("router", CMatrix),
        ("router_bias", ctypes.c_void_p),
        *((f"{name}_constant", ctypes.c_void_p) for name in ("gate", "up", "down")),
        *((f"{name}_mask", ctypes.POINTER(CMask)) for name in ("gate", "up", "product", "gate_in", "up_in")),
        *((f"{name}_low_rank", CLowRank) for name in ("gate", "up")),
        ("store", ctypes.c_void_p),
        ("input_store", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("dtype", "gate_kind", "up_kind", "dense", "threads", "weight_format")),
        *((name, ctypes.c_int32) for name in ("gate_by_columns", "up_by_columns", "up_first")),
        ("gate_threshold", ctypes.c_float),
        ("predictor_threshold", ctypes.c_float),
        ("copy_threshold", ctypes.c_float),
        *((name, ctypes.c_int64) for name in COUNTS),
    )


def native_ffn(
    x: torch.Tensor,
    weights: FfnWeights,
    activation: Activation,
    predictor_x: torch.Tensor,
    dense: bool,
    threads: int,
    up_x: torch.Tensor | None = None,
) -> tuple[torch.Tensor, RowsRead]:
    """As `sparse_ffn`, for x [tokens, hidden] of at most MAX_TOKENS tokens, already checked."""
    library = kernels()
    assert library is not None, "there is no compiler; sparse_ffn chooses torch then"
    if dense:
        weights = replace(weights, predictor=None)
    call, held = ffn_call(weights, activation, x.dtype, threads=threads)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = {"x": x} | ({"predictor_x": predictor_x} if weights.reads_before_masks else {})
    given |= {} if up_x is None else {"up_x": up_x}
    for name, part in given.items():
        setattr(call, name, _c_rows(part, held))
    call.tokens, call.out, call.dense = x.shape[0], out.data_ptr(), dense
    assert library.sparsify_call_bytes() == ctypes.sizeof(FfnCall)
    error = library.sparsify_ffn(ctypes.byref(call))
    assert error == 0, f"sparsify_ffn refused its arguments: {error}"
    return out, take_rows(call)


def take_rows(call: FfnCall) -> RowsRead:
    """What a call, or all calls with it since the last time, counted."""
    counts = [getattr(call, name) for name in COUNTS]
    for name in COUNTS:
        setattr(call, name, 0)
    offered, *read = counts
    return RowsRead(*read[:3], offered=offered, gate_columns=read[3], up_columns=read[4])


def ffn_call(
    weights: FfnWeights, activation: Activation, dtype: torch.dtype, *, threads: int = 1
) -> tuple[FfnCall, list[Any]]:
    """A block's weights as C++ reads them, without tokens, and what must live as long as the call is used."""
    parts: dict[str, Matrix] = {"gate": weights.gate, "up": weights.up, "down_t": weights.down_t}
    predictor = weights.predictor
    if predictor is not None:
        parts |= {"predictor_a": predictor.a, "predictor_b": predictor.b}
    copies = weights.copies
    if copies is not None:
        parts |= {"gate_copy": copies.gate, "up_copy": copies.up}
    router, bias = weights.router, None
    if router is not None:
        parts["router"], bias = router.weight.to(dtype), router.bias.detach().float().contiguous()
    held: list[Any] = []
    read = {name: c_matrix(part, held) for name, part in parts.items()}
    thresholds = dict(zip(("product", "gate"), weights.thresholds_for(weights.gate.device), strict=True))
    masks = {
        f"{name}_mask": CMask(thresholds=values.data_ptr(), rule=THRESHOLD)
        for name, values in thresholds.items()
        if values is not None
    } | {
        f"{'product' if site == 'inter' else site}_mask": c_mask(mask, weights.neurons, dtype, held)
        for site, mask in weights.masks.items()
    }
    constants = {
        name: values.detach().to(torch.float32).contiguous()
        for name, values in weights.constants().items()
        if values is not None
    }
    call = FfnCall(
        hidden=weights.hidden,
        neurons=weights.neurons,
        rank=0 if predictor is None else predictor.a.shape[0],
        groups=0 if router is None else len(router.weight),
        kept_groups=0 if router is None else router.kept or 0,
        router_bias=None if bias is None else bias.data_ptr(),
        dtype=NATIVE_DTYPES[dtype],
        gate_kind=_GATE_KINDS[activation.gate],
        up_kind=_UP_KINDS[activation.up],
        threads=threads,
        weight_format=weight_format(weights.gate),
        gate_by_columns="gate" in weights.by_columns,
        up_by_columns="up" in weights.by_columns,
        up_first=weights.up_first,
        gate_threshold=activation.gate_threshold,
        predictor_threshold=0.0 if predictor is None else predictor.threshold,
        copy_threshold=0.0 if copies is None else copies.threshold,
        **read,
        **{name: values.data_ptr() for name, values in constants.items()},
        **{name: ctypes.pointer(mask) for name, mask in masks.items()},
    )
    if weights.store is not None:
        weights.store.attach(call)
    return call, [*held, bias, *constants.values(), *thresholds.values(), *masks.values()]


def c_mask(mask: Any, count: int, dtype: torch.dtype, held: list[Any]) -> CMask:
    """The mask of a site of so many elements as C++ reads it.

    Args:
        mask: A SiteMask without numbers of several experts.
        count: Elements of the site.
        dtype: Of the model, and so of a basis.
        held: Gets the tensors that must live as long.
    """

    def address(values: torch.Tensor) -> int:
        held.append(values := values.detach().float().expand(count).contiguous())
        return values.data_ptr()

    rule = getattr(mask, "rule", None)
    if rule is None or rule.rule == "threshold":  # bundles of older versions know no other
        made = CMask(thresholds=address(mask.threshold), rule=THRESHOLD)
    else:
        made = CMask(weights=address(mask.weight) if rule.weighted else None)
        if rule.rule == "top_k":
            made.kept, made.rule = kept_count(float(mask.kept_share), count), TOP_K
        else:
            made.mass, made.rule = 1 - float(mask.dropped_mass), TOP_P
    basis = getattr(mask, "basis", None)
    if basis is not None:
        made.basis = c_matrix(basis.detach().to(dtype), held)
    return made


def c_matrix(matrix: Matrix, held: list[Any]) -> CMatrix:
    """A matrix of weights as C++ reads it, whose kernels are loaded; `held` gets the tensors that must live as long.

    Rows need not be adjacent (a slice of a larger matrix). Elements of a row must be; otherwise the matrix is copied first.
    """
    name = STORED_FORMATS[matrix.dtype] if isinstance(matrix, torch.Tensor) else matrix.format
    if not load_formats((name,)):
        raise ModelError(
            f"The kernels that read {name} weights could be neither compiled nor loaded, though others were.",
            next_step="See the warning about the compiler.",
        )
    return _c_rows(matrix, held)


def _c_rows(matrix: Matrix, held: list[Any]) -> CMatrix:
    factors = None if isinstance(matrix, torch.Tensor) else matrix.factors
    rows = matrix if isinstance(matrix, torch.Tensor) else matrix.data
    if not isinstance(matrix, PackedMatrix) and rows.stride(1) != 1:
        rows = rows.contiguous()
    held += [rows, factors]
    stride = matrix.row_bytes if isinstance(matrix, PackedMatrix) else rows.stride(0)
    return CMatrix(rows.data_ptr(), stride, factors=None if factors is None else factors.data_ptr())


def weight_format(matrix: Matrix) -> int:
    """Number of a matrix's format in C++: 0 as stored."""
    return 0 if isinstance(matrix, torch.Tensor) else _FORMATS[matrix.format]
