"""Configuration of Sparse Mixtral."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, MixtralConfig

from .activations import STOCK_ACTIVATION
from .masking import read_mask


@strict
class SparseMixtralConfig(MixtralConfig):
    """A Mixtral whose experts' activation is named by `ffn_activation`; see SparseMistralConfig for the model type."""

    model_type = "sparse_mixtral"

    ffn_activation: str = STOCK_ACTIVATION
    ffn_gate_threshold: float = 0.0
    """What `shifted_relu` subtracts from the gate, and what `fatrelu` keeps it above; 0 for every other activation."""
    sparsification: dict[str, Any] | None = None
    """The mask that the model stores (`masking.py`): the method that fitted it, and the rule of each site; None for none."""
    base_ffn_activation: str = STOCK_ACTIVATION
    """Activation of the checkpoint that this one was converted from."""
    base_ffn_gate_threshold: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        read_mask(self, kwargs)
        super().__post_init__(**kwargs)


AutoConfig.register(SparseMixtralConfig.model_type, SparseMixtralConfig, exist_ok=True)

__all__ = ["SparseMixtralConfig"]
