"""What every kernel of an activation must do. Run as a program, it checks the Triton kernels by Triton's interpreter.

It imports torch and the kernels only, and stands apart since Triton must be told to interpret before it is imported.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
Backward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

EAGER = {
    "swiglu": lambda g, u: nn.functional.silu(g) * u,
    "reglu": lambda g, u: torch.relu(g) * u,
    "drelu": lambda g, u: torch.relu(g) * torch.relu(u),
}
BIT_EQUAL = ("reglu", "drelu")
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}


def step(x: torch.Tensor) -> torch.Tensor:
    return (x > 0).double()


def formula(name: str, g: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Product, and its derivatives by gate and up; float64."""
    g, u = g.double(), u.double()
    sigmoid = 1 / (1 + torch.exp(-g))
    return {
        "swiglu": (g * sigmoid * u, sigmoid * (1 + g * (1 - sigmoid)) * u, g * sigmoid),
        "reglu": (g * step(g) * u, step(g) * u, g * step(g)),
        "drelu": (g * step(g) * u * step(u), step(g) * u * step(u), g * step(g) * step(u)),
    }[name]


def pre_activations(dtype: torch.dtype, neurons: int) -> tuple[torch.Tensor, ...]:
    """Gradient, gate and up, [5, neurons]: gate and up are halves of one projection, a third of them exactly zero."""
    torch.manual_seed(0)
    both = torch.randn(5, 2 * neurons)
    both[torch.rand_like(both) < 0.3] = 0.0
    both[0, :4], both[0, neurons : neurons + 4] = -0.0, torch.tensor([-1.0, 0.0, -0.0, 2.0])
    gate, up = both.to(dtype).chunk(2, dim=-1)
    assert not gate.is_contiguous()
    return torch.randn(5, neurons).to(dtype), gate, up


def check_kernel(name: str, forward: Forward, backward: Backward, neurons: int, exact: tuple[torch.dtype, ...]) -> None:
    """Values, gradients, counts and NaN; in the dtypes of `exact` also the very bits of eager torch."""
    for dtype in TOLERANCES:
        grad, gate, up = pre_activations(dtype, neurons)
        zeros = torch.tensor(7)
        product = forward(gate, up, zeros)
        got = product, *backward(grad, gate, up)
        expected, by_gate, by_up = formula(name, gate, up)
        for ours, wanted in zip(got, (expected, grad * by_gate, grad * by_up), strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), wanted, rtol=TOLERANCES[dtype], atol=1e-6)
        assert int(zeros) == 7 + int((product == 0).sum())
        assert torch.equal(forward(gate, up, None), product)
        if name in BIT_EQUAL and dtype in exact:
            _check_against_eager(name, got, (grad, gate, up))
    _check_nan(forward, backward, neurons)


def _check_against_eager(name: str, got: tuple[torch.Tensor, ...], given: tuple[torch.Tensor, ...]) -> None:
    grad, gate, up = given
    gate, up = gate.clone().requires_grad_(), up.clone().requires_grad_()
    product = EAGER[name](gate, up)
    product.backward(grad)
    for ours, theirs in zip(got, (product, gate.grad, up.grad), strict=True):
        assert torch.equal(ours, theirs)


def _check_nan(forward: Forward, backward: Backward, neurons: int) -> None:
    """A NaN must reach the loss and the gradient norm, or the loop would never see a bad step."""
    grad, gate, up = (torch.ones(1, neurons) for _ in range(3))
    gate[0, 1], up[0, 2], grad[0, 3] = torch.nan, torch.nan, torch.nan
    product = forward(gate, up, None)
    assert product.isnan().nonzero()[:, 1].tolist() == [1, 2]
    gate_grad, up_grad = backward(grad, gate, up)
    assert gate_grad[0, 2:4].isnan().all()
    assert up_grad[0, [1, 3]].isnan().all()
    assert not gate_grad[0, 4:].isnan().any()


def check_triton() -> None:
    from sparsify.models.activations import activation_names
    from sparsify.training.kernels import activation_triton

    for name in activation_names(lambda row: row.has_training_kernel):
        forward = partial(activation_triton.forward, name)
        backward = partial(activation_triton.backward, name)
        for neurons in (50, activation_triton.BLOCK_NEURONS + 3):
            # The interpreter cuts bits off where hardware rounds to bf16.
            check_kernel(name, forward, backward, neurons, (torch.float32, torch.float16))


if __name__ == "__main__":
    check_triton()
