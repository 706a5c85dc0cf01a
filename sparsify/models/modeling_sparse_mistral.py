"""Sparse Mistral: transformers' Mistral with a named feed-forward activation.

Same parameters, same names, same checkpoint layout as Mistral; only the activation differs.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralForCausalLM
from transformers.models.mistral.modeling_mistral import MistralMLP

from .configuration_sparse_mistral import SparseMistralConfig
from .ffn_activation import FfnActivation


class SparseMistralMLP(MistralMLP):
    """down_proj(ffn_activation(gate_proj(x), up_proj(x)))."""

    ffn_activation: FfnActivation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps hidden states [batch, tokens, hidden] to the same shape."""
        return self.down_proj(self.ffn_activation(self.gate_proj(x), self.up_proj(x)))


class SparseMistralForCausalLM(MistralForCausalLM):
    """Mistral for causal language modelling, with `config.ffn_activation` in every feed-forward block."""

    config_class = SparseMistralConfig
    config: SparseMistralConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: SparseMistralConfig) -> None:
        super().__init__(config)
        for block in self.ffn_blocks():
            # Re-classing the finished module keeps its parameters, their names and their initialisation,
            # under meta-device loading and ZeRO-3 partitioned construction alike.
            block.__class__ = SparseMistralMLP
            block.ffn_activation = FfnActivation(config.ffn_activation)
            del block.act_fn

    def ffn_blocks(self) -> list[Any]:
        """The module of every layer that holds `ffn_activation`, in order."""
        return [layer.mlp for layer in self.model.layers]

    def set_ffn_activation(self, name: str) -> None:
        """Swaps the activation of every layer in place; the weights stay as they are."""
        for block in self.ffn_blocks():
            block.ffn_activation = FfnActivation(name)
        self.config.ffn_activation = name


AutoModelForCausalLM.register(SparseMistralConfig, SparseMistralForCausalLM, exist_ok=True)

__all__ = ["SparseMistralForCausalLM"]
