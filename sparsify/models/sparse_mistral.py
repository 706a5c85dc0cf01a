"""Sparse Mistral: same parameters, same names, same checkpoint layout as Mistral; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig, MistralForCausalLM, MistralModel

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseMistralConfig(SparseConfig, MistralConfig):
    model_type = "sparse_mistral"


class SparseMistralModel(SparseDecoder, MistralModel):
    config_class = SparseMistralConfig


class SparseMistralForCausalLM(SparseCausalLM, MistralForCausalLM):
    config_class = SparseMistralConfig
    decoder_class = SparseMistralModel


FAMILY = register(Family(SparseMistralForCausalLM, {"mistral": MistralConfig}))

__all__ = ["SparseMistralConfig", "SparseMistralForCausalLM", "SparseMistralModel"]
