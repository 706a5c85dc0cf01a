"""What a kernel must know of an activation: which neurons it may skip after reading only their gate row.

This is the skipping side of `sparsify.models.FFN_ACTIVATIONS`; tests hold both against each other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import silu

GateKind = Literal["relu", "relu_squared", "shifted_relu", "silu"]
UpKind = Literal["identity", "relu"]


@dataclass(frozen=True)
class KernelActivation:
    """The two factors of a gated block, in terms of kernels.

    Args:
        gate: Left factor. `relu` is g where g > gate_threshold, else 0 (FATReLU where the threshold is not 0),
            `relu_squared` its square, `shifted_relu` g - gate_threshold there, `silu` is never 0.
        up: Right factor.
        gate_threshold: A gate pre-activation must be larger for its neuron to count; silu has none.
    """

    gate: GateKind
    up: UpKind
    gate_threshold: float = 0.0

    def gate_factor(self, gate: torch.Tensor) -> torch.Tensor:
        """Left factor of gate pre-activations of any shape. NaN stays NaN."""
        if self.gate == "silu":
            return silu(gate)
        value = gate - self.gate_threshold if self.gate == "shifted_relu" else gate
        value = value.square() if self.gate == "relu_squared" else value
        return torch.where(gate <= self.gate_threshold, 0.0, value)

    def up_factor(self, up: torch.Tensor) -> torch.Tensor:
        """Right factor of up pre-activations of any shape."""
        return up.relu() if self.up == "relu" else up


KERNEL_ACTIVATIONS: dict[str, KernelActivation] = {
    "drelu": KernelActivation("relu", "relu"),
    "reglu": KernelActivation("relu", "identity"),
    "fatrelu": KernelActivation("relu", "identity"),
    "shifted_relu": KernelActivation("shifted_relu", "identity"),
    "relu2": KernelActivation("relu_squared", "identity"),
    # Zeros only from thresholds: no gate row decides alone, so only rows of down_proj are saved.
    "swiglu": KernelActivation("silu", "identity"),
}
"""By the names of `ffn_activation`, at a gate threshold of 0."""
