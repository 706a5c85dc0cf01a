"""Which half of its inputs a neuron keeps under dReLU.

A gated neuron adds f(gate) · up · down to the stream. Negating its row of the up projection together with its column of the
down projection changes nothing as long as up is not rectified: SwiGLU and ReGLU stay what they are. dReLU keeps only up > 0,
so the sign decides what survives.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsify.conversion.layer_reader import Expert

RECTIFIES_UP = ("drelu",)


class SignEnergies:
    """Per neuron, the energy that survives with its present sign and with the other, over rows of inputs."""

    def __init__(self, num_neurons: int, device: torch.device) -> None:
        self.kept = torch.zeros(2, num_neurons, dtype=torch.float64, device=device)

    def add(self, expert: Expert, x: torch.Tensor) -> None:
        """Adds inputs [rows, hidden] of an expert that has the new activation."""
        gate, up = x @ expert.gate.T, x @ expert.up.T
        for sign, kept in zip((1, -1), self.kept, strict=True):
            kept += expert.activation(gate, sign * up).square().sum(0)

    def flips(self) -> torch.Tensor:
        """Which neurons keep more with the other sign. Bool [neurons]"""
        return self.kept[1] > self.kept[0]


def flip(expert: Expert, flips: torch.Tensor) -> Expert:
    """The expert with up row and down column of the chosen neurons negated.

    Args:
        expert: Any.
        flips: Bool [neurons].
    """
    sign = 1 - 2 * flips.to(expert.up.dtype)
    return replace(expert, up=expert.up * sign[:, None], down=expert.down * sign)
