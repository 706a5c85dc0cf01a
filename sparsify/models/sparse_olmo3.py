"""Sparse OLMo 3: OLMo 2 with layers that attend to a sliding window; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Olmo3Config, Olmo3ForCausalLM, Olmo3Model

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseOlmo3Config(SparseConfig, Olmo3Config):
    model_type = "sparse_olmo3"


class SparseOlmo3Model(SparseDecoder, Olmo3Model):
    config_class = SparseOlmo3Config


class SparseOlmo3ForCausalLM(SparseCausalLM, Olmo3ForCausalLM):
    config_class = SparseOlmo3Config
    decoder_class = SparseOlmo3Model


FAMILY = register(
    Family(
        SparseOlmo3ForCausalLM,
        {"olmo3": Olmo3Config},
        attention_norm=None,
        ffn_norm=None,
        rounds_before_factors=False,
        ffn_output_norm="post_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
    )
)

__all__ = ["SparseOlmo3Config", "SparseOlmo3ForCausalLM", "SparseOlmo3Model"]
