"""The sections of a recipe that say what becomes of the dense model before training."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

FFN_ACTIVATIONS = ("swiglu", "reglu", "shifted_relu", "relu2", "fatrelu", "drelu")
GATE_THRESHOLDS = {"shifted_relu": 1.0, "fatrelu": 0.01}
"""Activations that have a gate threshold, and the published one: ReLU Strikes Back (2310.04564), ProSparse (2402.13516)."""


@dataclass
class ActivationSection:
    """The feed-forward activation to train with: one of FFN_ACTIVATIONS."""

    ffn_activation: str = MISSING
    gate_threshold: float | None = None
    """What `shifted_relu` subtracts from the gate, and what `fatrelu` keeps it above; null takes the published one
    (GATE_THRESHOLDS). No other activation has one."""

    @property
    def model_gate_threshold(self) -> float:
        """`ffn_gate_threshold` of the model's configuration."""
        if self.gate_threshold is not None:
            return self.gate_threshold
        return GATE_THRESHOLDS.get(self.ffn_activation, 0.0)
