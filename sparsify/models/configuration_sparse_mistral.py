"""Configuration of Sparse Mistral."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, MistralConfig


@strict
class SparseMistralConfig(MistralConfig):
    """A Mistral whose feed-forward activation is named by `ffn_activation`.

    The model type is not a stock one on purpose: `hidden_act="relu"` on a stock Mistral is ReGLU, another
    function than dReLU, and would load without a word.
    """

    model_type = "sparse_mistral"

    ffn_activation: str = "swiglu"
    base_ffn_activation: str = "swiglu"
    """Activation of the checkpoint that this one was converted from."""


AutoConfig.register(SparseMistralConfig.model_type, SparseMistralConfig, exist_ok=True)

__all__ = ["SparseMistralConfig"]
