"""Sparse OLMo 2: norms are behind the attention and the feed-forward block; only the activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Olmo2Config, Olmo2ForCausalLM, Olmo2Model

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register


@strict
class SparseOlmo2Config(SparseConfig, Olmo2Config):
    model_type = "sparse_olmo2"


class SparseOlmo2Model(SparseDecoder, Olmo2Model):
    config_class = SparseOlmo2Config


class SparseOlmo2ForCausalLM(SparseCausalLM, Olmo2ForCausalLM):
    config_class = SparseOlmo2Config
    decoder_class = SparseOlmo2Model


FAMILY = register(
    Family(
        SparseOlmo2ForCausalLM,
        {"olmo2": Olmo2Config},
        attention_norm=None,
        ffn_norm=None,
        rounds_before_factors=False,
        ffn_output_norm="post_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
    )
)

__all__ = ["SparseOlmo2Config", "SparseOlmo2ForCausalLM", "SparseOlmo2Model"]
