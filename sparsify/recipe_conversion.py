"""The sections of a recipe that say what becomes of the dense model before training: `activation` and `conversion`."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

FFN_ACTIVATIONS = ("swiglu", "reglu", "shifted_relu", "relu2", "fatrelu", "drelu")
GATE_THRESHOLDS = {"shifted_relu": 1.0, "fatrelu": 0.01}
"""Activations that have a gate threshold, and the published one: ReLU Strikes Back (2310.04564), ProSparse (2402.13516)."""
REFIT_TARGETS = {"own": 0.0, "mix": 0.5, "residual": 1.0}
"""Which part of what is amiss in the residual stream a refit is asked to mend, beside answering as the block once did."""


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


@dataclass
class ConversionSection:
    """What the swap of the activation does to the weights before any training (`docs/calibration.md`)."""

    calibration_tokens: int = 0
    """Training tokens of the mixture that the calibrated swap rests on: signs, thresholds and a refit of the down
    projections, layer by layer. 0 swaps the activation and nothing else."""
    refit_target: str = "mix"
    """What a refitted block should answer, one of REFIT_TARGETS: `own`, what it answered before; `residual`, also what the
    layers before it lost; `mix`, half of that."""
    ridge: float = 0.01
    """How strongly a refit, one of `swap.refit_milestones` too, holds on to the old weights: as a share of the mean of its
    Gram matrix's diagonal."""
    target_zeros: float | None = None
    """Share of exact zeros that thresholds give every layer on the calibration tokens; null sets none."""
