"""The feed-forward activations as one Triton kernel forward and one backward; rows need not be adjacent in memory.

Arithmetic is fp32, rounded once to the dtype of the pre-activations. NaN passes, as in torch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sparsify.models.activations import ACTIVATIONS

BLOCK_NEURONS = 2048
NUM_WARPS = 8


@triton.jit
def _relu(x):
    return tl.where(x <= 0.0, 0.0, x)


@triton.jit
def _forward(
    gate,
    up,
    product,
    zeros,
    gate_stride,
    up_stride,
    neurons,
    SILU: tl.constexpr,
    UP_RELU: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < neurons
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    left = g / (1.0 + tl.exp(-g)) if SILU else _relu(g)
    right = _relu(u) if UP_RELU else u
    h = (left * right).to(product.dtype.element_ty)
    tl.store(product + row * neurons + columns, h, mask=inside)
    if COUNT:
        # One counter per program: atomic additions to a single counter would serialise.
        found = tl.sum(((h == 0.0) & inside).to(tl.int32), axis=0)
        tl.store(zeros + row * tl.num_programs(1) + tl.program_id(1), found)


@triton.jit
def _backward(
    grad,
    gate,
    up,
    gate_grad,
    up_grad,
    grad_stride,
    gate_stride,
    up_stride,
    neurons,
    SILU: tl.constexpr,
    UP_RELU: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < neurons
    d = tl.load(grad + row * grad_stride + columns, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + columns, mask=inside, other=0.0).to(tl.float32)
    right = _relu(u) if UP_RELU else u
    if SILU:
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        left = g * sigmoid
        dg = d * right * (sigmoid * (1.0 + g * (1.0 - sigmoid)))
    else:
        left = _relu(g)
        dg = tl.where(g <= 0.0, 0.0, d * right)
    du = d * left
    if UP_RELU:
        du = tl.where(u <= 0.0, 0.0, du)
    place = row * neurons + columns
    tl.store(gate_grad + place, dg.to(gate_grad.dtype.element_ty), mask=inside)
    tl.store(up_grad + place, du.to(up_grad.dtype.element_ty), mask=inside)


def forward(name: str, gate: torch.Tensor, up: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Neuron activations of pre-activations of the same shape [..., neurons] and any float dtype but float64; their
    exact zeros are added to `zeros`, int64 [].
    """
    product = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate_rows, up_rows = _rows(gate), _rows(up)
    num_rows, neurons = gate_rows.shape
    grid = num_rows, -(-neurons // BLOCK_NEURONS)
    found = None
    if zeros is not None:
        found = torch.empty(grid, dtype=torch.int32, device=gate.device)
    activation = ACTIVATIONS[name]
    if product.numel():
        launch: Any = _forward[grid]
        launch(
            gate_rows,
            up_rows,
            product,
            found,
            gate_rows.stride(0),
            up_rows.stride(0),
            neurons,
            SILU=activation.gate == "silu",
            UP_RELU=activation.up == "relu",
            COUNT=found is not None,
            BLOCK=BLOCK_NEURONS,
            num_warps=NUM_WARPS,
        )
    if zeros is not None and found is not None:
        zeros += found.sum()
    return product


def backward(name: str, grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the gate and up pre-activations, from that of their product; shapes as in `forward`."""
    gate_grad = torch.empty_like(gate, memory_format=torch.contiguous_format)
    up_grad = torch.empty_like(gate_grad)
    rows = [_rows(tensor) for tensor in (grad, gate, up)]
    num_rows, neurons = rows[0].shape
    activation = ACTIVATIONS[name]
    if gate_grad.numel():
        launch: Any = _backward[num_rows, -(-neurons // BLOCK_NEURONS)]
        launch(
            *rows,
            gate_grad,
            up_grad,
            *(tensor.stride(0) for tensor in rows),
            neurons,
            SILU=activation.gate == "silu",
            UP_RELU=activation.up == "relu",
            BLOCK=BLOCK_NEURONS,
            num_warps=NUM_WARPS,
        )
    return gate_grad, up_grad


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[rows, neurons] with contiguous rows; a view if possible, e.g. of one half of a fused projection."""
    rows = tensor.flatten(0, -2) if tensor.ndim != 1 else tensor[None]
    return rows if rows.stride(1) == 1 else rows.contiguous()
