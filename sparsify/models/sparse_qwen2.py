"""Sparse Qwen2 and Qwen2.5: queries, keys and values have biases; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Model

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseQwen2Config(SparseConfig, Qwen2Config):
    model_type = "sparse_qwen2"


class SparseQwen2Model(SparseDecoder, Qwen2Model):
    config_class = SparseQwen2Config


class SparseQwen2ForCausalLM(SparseCausalLM, Qwen2ForCausalLM):
    config_class = SparseQwen2Config
    decoder_class = SparseQwen2Model


FAMILY = register(Family(SparseQwen2ForCausalLM, {"qwen2": Qwen2Config}))

__all__ = ["SparseQwen2Config", "SparseQwen2ForCausalLM", "SparseQwen2Model"]
