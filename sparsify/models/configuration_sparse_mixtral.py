"""Configuration of Sparse Mixtral."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, MixtralConfig

from .activations import STOCK_ACTIVATION


@strict
class SparseMixtralConfig(MixtralConfig):
    """A Mixtral whose experts' activation is named by `ffn_activation`; see SparseMistralConfig for the model type."""

    model_type = "sparse_mixtral"

    ffn_activation: str = STOCK_ACTIVATION
    ffn_gate_threshold: float = 0.0
    """What `shifted_relu` subtracts from the gate, and what `fatrelu` keeps it above; 0 for every other activation."""
    ffn_thresholds: str = "none"
    """`neuron`: activations are zeroed where they do not exceed their neuron's threshold, which is stored with the weights."""
    base_ffn_activation: str = STOCK_ACTIVATION
    """Activation of the checkpoint that this one was converted from."""
    base_ffn_gate_threshold: float = 0.0


AutoConfig.register(SparseMixtralConfig.model_type, SparseMixtralConfig, exist_ok=True)

__all__ = ["SparseMixtralConfig"]
