"""The feed-forward activations, one formula each.

A gated feed-forward block computes `down_proj(f(gate_proj(x)) * g(up_proj(x)))`. The pair (f, g) is the
activation; neuron i is inactive for a token when the product is exactly zero, and then neither row i of
gate_proj and up_proj nor column i of down_proj matters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Factor = Callable[[torch.Tensor], torch.Tensor]


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


FFN_ACTIVATIONS: dict[str, tuple[Factor, Factor]] = {
    # Shazeer 2020, arXiv 2002.05202: silu(gate) * up
    "swiglu": (nn.functional.silu, _identity),
    # ReLU Strikes Back, arXiv 2310.04564, on a gated block: relu(gate) * up
    "reglu": (torch.relu, _identity),
    # TurboSparse, arXiv 2406.05955, section 3.1: relu(gate) * relu(up)
    "drelu": (torch.relu, torch.relu),
}


class FfnActivation(nn.Module):
    """Multiplies the two factors of a gated feed-forward block.

    It is a module, so that a probe can hook every place where neurons fire, in dense blocks and in fused experts.

    Args:
        name: A key of FFN_ACTIVATIONS.

    Raises:
        ValueError: If there is no such activation.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in FFN_ACTIVATIONS:
            raise ValueError(f"ffn_activation is {name!r}; allowed: {', '.join(FFN_ACTIVATIONS)}")
        self.name = name

    def gate_factor(self, gate: torch.Tensor) -> torch.Tensor:
        """Left factor of the product, from gate pre-activations of any shape."""
        return FFN_ACTIVATIONS[self.name][0](gate)

    def up_factor(self, up: torch.Tensor) -> torch.Tensor:
        """Right factor of the product, from up pre-activations of any shape."""
        return FFN_ACTIVATIONS[self.name][1](up)

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Returns the neuron activations, of the same shape as `gate` and `up`: [..., neurons]."""
        return self.gate_factor(gate) * self.up_factor(up)

    def extra_repr(self) -> str:
        return self.name
