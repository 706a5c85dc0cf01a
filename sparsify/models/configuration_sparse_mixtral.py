"""Configuration of Sparse Mixtral."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, MixtralConfig


@strict
class SparseMixtralConfig(MixtralConfig):
    """A Mixtral whose experts' activation is named by `ffn_activation`; see SparseMistralConfig for the model type."""

    model_type = "sparse_mixtral"

    ffn_activation: str = "swiglu"
    base_ffn_activation: str = "swiglu"
    """Activation of the checkpoint that this one was converted from."""


AutoConfig.register(SparseMixtralConfig.model_type, SparseMixtralConfig, exist_ok=True)

__all__ = ["SparseMixtralConfig"]
