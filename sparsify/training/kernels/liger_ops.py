"""Liger's kernels (arXiv 2410.10989) as functions, each checked against torch's operators before its first use."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import metadata
from typing import Any, Literal, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

from sparsify.errors import RunError
from sparsify.mixture.sequences.reader import NO_LOSS

PACKAGE = "liger-kernel"

Tensors = tuple[torch.Tensor, ...]


def installed_version() -> str | None:
    try:
        return metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None


Norm = Literal["llama", "gemma"]
"""Where a norm rounds to the states' dtype: before the product with its weight, as in Llama, or after it, as in Gemma."""


def rms_norm(
    hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, kind: Norm = "llama", offset: float = 0.0
) -> torch.Tensor:
    """Root mean square norm times a weight [hidden] plus an offset. [..., hidden]"""
    # Not in place: the output's gradient belongs to autograd.
    return _liger().LigerRMSNormFunction.apply(hidden, weight, epsilon, offset, kind, False)


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Tensors:
    """Rotary embedding of queries and keys, in place. [sequences, heads, tokens, head size] each

    Args:
        query: [sequences, heads, tokens, head size].
        key: [sequences, key heads, tokens, head size].
        cos: [sequences or 1, tokens, head size].
        sin: As `cos`.
    """
    return _liger().LigerRopeFunction.apply(query, key, cos, sin)


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
    """Cross-entropy of a projection's logits, computed in chunks.

    Args:
        hidden: [sequences, tokens, hidden].
        weight: [vocabulary, hidden].
        labels: int64 [sequences, tokens]; NO_LOSS for tokens without loss.

    Returns:
        The sum in nats, [], which has a gradient; and each sequence's part of it, [sequences], which has none.
    """
    return cast(Tensors, _LinearCrossEntropy.apply(hidden, weight, labels))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes both gradients of the sum together with its value, while a chunk of the logits is in memory.

    Liger's own function for losses by token recomputes the logits in its backward pass, and rounds the incoming gradient to
    their dtype.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> Tensors:
        from liger_kernel.ops.fused_linear_cross_entropy import (  # pyright: ignore[reportMissingImports]
            fused_linear_cross_entropy_forward,
        )

        by_token, _, _, _, hidden_grad, weight_grad, _ = fused_linear_cross_entropy_forward(
            hidden.flatten(0, 1),
            weight,
            labels.flatten(),
            ignore_index=NO_LOSS,
            reduction="none",
            accum_dtype=torch.float32,
            compute_gradients=True,
            weight_requires_grad=True,
        )
        ctx.save_for_backward(hidden_grad.view_as(hidden), weight_grad)
        by_sequence = by_token.view_as(labels).sum(1)
        ctx.mark_non_differentiable(by_sequence)
        return by_sequence.sum(), by_sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: object) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        # As a number: a tensor would be rounded to the gradients' dtype first.
        factor = float(grad)
        return *(saved.mul_(factor) for saved in ctx.saved_tensors), None


TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest deviation of a kernel from torch, relative to the largest value; in bf16 both are rounded."""


@cache
def check_kernels(device: str, dtype: torch.dtype) -> None:
    """Checks every kernel, forward and backward, against torch's operators.

    Raises:
        RunError: If one cannot be built here, or computes another value.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_()

    labels = torch.tensor([[2, 6, NO_LOSS], [0, NO_LOSS, 1]], device=device)
    cos, sin = (random(1, 3, 2).detach().repeat(1, 1, 2) for _ in range(2))
    cases: dict[str, tuple[Callable[..., Tensors], Callable[..., Tensors], Tensors]] = {
        "norm": (
            lambda x, w: (rms_norm(x, w, 1e-5),),
            lambda x, w: (functional.rms_norm(x, (8,), w, 1e-5),),
            (random(2, 3, 8), random(8)),
        ),
        "norm of Gemma": (
            lambda x, w: (rms_norm(x, w, 1e-5, "gemma", 1.0),),
            lambda x, w: (functional.rms_norm(x.float(), (8,), 1 + w.float(), 1e-5).to(dtype),),
            (random(2, 3, 8), random(8)),
        ),
        "rotary embedding": (
            lambda q, k: rotate(q.clone(), k.clone(), cos, sin),
            lambda q, k: tuple(x * cos[:, None] + _rotated_half(x) * sin[:, None] for x in (q, k)),
            (random(2, 4, 3, 4), random(2, 2, 3, 4)),
        ),
        "loss": (
            lambda x, w: linear_cross_entropy(x, w, labels)[:1],
            lambda x, w: (_cross_entropy(x @ w.T, labels),),
            (random(2, 3, 8), random(7, 8)),
        ),
    }
    for name, (ours, plain, inputs) in cases.items():
        try:
            got = _with_gradients(ours, inputs)
        except Exception as error:
            raise _broken(name, f"cannot be built here: {error}") from error
        for found, wanted in zip(got, _with_gradients(plain, inputs), strict=True):
            # Not ">": NaN must fail, too.
            if not (found - wanted).abs().max() <= TOLERANCES[dtype] * wanted.abs().max():
                raise _broken(name, "gives other values here than torch")


def _with_gradients(function: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    outputs = function(*inputs)
    weights = (torch.arange(1.0, x.numel() + 1, device=x.device).view_as(x) for x in outputs)
    total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
    return *outputs, *torch.autograd.grad(cast(torch.Tensor, total), inputs)


def _broken(name: str, what: str) -> RunError:
    return RunError(
        f"Liger's kernel of the {name} {what}.",
        next_step="Set training.liger_kernels=false, which trains with torch's own operators.",
    )


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")


def _rotated_half(x: torch.Tensor) -> torch.Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def _liger() -> Any:
    from liger_kernel import ops  # pyright: ignore[reportMissingImports]

    return ops
