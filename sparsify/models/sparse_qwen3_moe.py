"""Sparse Qwen3-MoE: Qwen3 with many small experts in every layer; only their activation differs."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, Qwen3MoeModel

from .family import Family, SparseConfig, register
from .fused_experts import SparseExpertsDecoder, SparseExpertsForCausalLM, keep_layout


@strict
class SparseQwen3MoeConfig(SparseConfig, Qwen3MoeConfig):
    model_type = "sparse_qwen3_moe"


class SparseQwen3MoeModel(SparseExpertsDecoder, Qwen3MoeModel):
    config_class = SparseQwen3MoeConfig


class SparseQwen3MoeForCausalLM(SparseExpertsForCausalLM, Qwen3MoeForCausalLM):
    config_class = SparseQwen3MoeConfig
    decoder_class = SparseQwen3MoeModel


keep_layout(SparseQwen3MoeConfig.model_type, "qwen3_moe")
FAMILY = register(
    Family(
        SparseQwen3MoeForCausalLM,
        {"qwen3_moe": Qwen3MoeConfig},
        expert_block="Qwen3MoeSparseMoeBlock",
        obstacles={
            "mlp_only_layers": ([], "some of its layers have no experts (mlp_only_layers)"),
            "decoder_sparse_step": (1, "some of its layers have no experts (decoder_sparse_step)"),
        },
    )
)

__all__ = ["SparseQwen3MoeConfig", "SparseQwen3MoeForCausalLM", "SparseQwen3MoeModel"]
