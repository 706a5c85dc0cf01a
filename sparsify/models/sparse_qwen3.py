"""Sparse Qwen3: queries and keys are normalised, and heads have a width of their own; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseQwen3Config(SparseConfig, Qwen3Config):
    model_type = "sparse_qwen3"


class SparseQwen3Model(SparseDecoder, Qwen3Model):
    config_class = SparseQwen3Config


class SparseQwen3ForCausalLM(SparseCausalLM, Qwen3ForCausalLM):
    config_class = SparseQwen3Config
    decoder_class = SparseQwen3Model


FAMILY = register(Family(SparseQwen3ForCausalLM, {"qwen3": Qwen3Config}))

__all__ = ["SparseQwen3Config", "SparseQwen3ForCausalLM", "SparseQwen3Model"]
