"""Sparse Gemma 3, of text: the stock activation is GeGLU, and norms are in front of and behind every block."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, Gemma3TextModel

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register

BASE = "geglu"


@strict
class SparseGemma3TextConfig(SparseConfig, Gemma3TextConfig):
    model_type = "sparse_gemma3_text"

    ffn_activation: str = BASE
    base_ffn_activation: str = BASE


class SparseGemma3TextModel(SparseDecoder, Gemma3TextModel):
    config_class = SparseGemma3TextConfig


class SparseGemma3ForCausalLM(SparseCausalLM, Gemma3ForCausalLM):
    config_class = SparseGemma3TextConfig
    decoder_class = SparseGemma3TextModel


FAMILY = register(
    Family(
        SparseGemma3ForCausalLM,
        {"gemma3_text": Gemma3TextConfig},
        base_activation=BASE,
        ffn_norm="pre_feedforward_layernorm",
        unit_offset=True,
        rounds_before_factors=False,
        ffn_output_norm="post_feedforward_layernorm",
        attention_output_norm="post_attention_layernorm",
        holders=("gemma3",),
        embedding_scale=lambda config: config.hidden_size**0.5,
        obstacles={
            "use_bidirectional_attention": (False, "it attends in both directions (use_bidirectional_attention)"),
        },
    )
)

__all__ = ["SparseGemma3ForCausalLM", "SparseGemma3TextConfig", "SparseGemma3TextModel"]
