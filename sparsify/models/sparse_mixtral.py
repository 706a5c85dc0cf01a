"""Sparse Mixtral: transformers' Mixtral with a named activation inside its fused experts."""

from __future__ import annotations

from huggingface_hub.dataclasses import strict
from transformers import MixtralConfig, MixtralForCausalLM, MixtralModel

from .family import Family, SparseConfig, register
from .fused_experts import SparseExpertsDecoder, SparseExpertsForCausalLM, keep_layout


@strict
class SparseMixtralConfig(SparseConfig, MixtralConfig):
    model_type = "sparse_mixtral"


class SparseMixtralModel(SparseExpertsDecoder, MixtralModel):
    config_class = SparseMixtralConfig


class SparseMixtralForCausalLM(SparseExpertsForCausalLM, MixtralForCausalLM):
    config_class = SparseMixtralConfig
    decoder_class = SparseMixtralModel


keep_layout(SparseMixtralConfig.model_type, "mixtral")
FAMILY = register(
    Family(
        SparseMixtralForCausalLM,
        {"mixtral": MixtralConfig},
        blocks_on_disk="block_sparse_moe",
        expert_block="MixtralSparseMoeBlock",
        expert_projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    )
)

__all__ = ["SparseMixtralConfig", "SparseMixtralForCausalLM", "SparseMixtralModel"]
