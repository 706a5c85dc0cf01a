"""Sparse Llama: Llama 2 and 3 as they are, with their own scaling of rotary positions; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseLlamaConfig(SparseConfig, LlamaConfig):
    model_type = "sparse_llama"


class SparseLlamaModel(SparseDecoder, LlamaModel):
    config_class = SparseLlamaConfig


class SparseLlamaForCausalLM(SparseCausalLM, LlamaForCausalLM):
    config_class = SparseLlamaConfig
    decoder_class = SparseLlamaModel


FAMILY = register(Family(SparseLlamaForCausalLM, {"llama": LlamaConfig}))

__all__ = ["SparseLlamaConfig", "SparseLlamaForCausalLM", "SparseLlamaModel"]
