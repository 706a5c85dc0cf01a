"""Sparse Phi-3: its fused projections are apart here, in memory and on disk, so that each can be masked; only the activation differs."""

from __future__ import annotations

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Phi3Config, Phi3ForCausalLM, Phi3Model
from transformers.models.phi3.modeling_phi3 import Phi3Attention

from .family import Family, SparseCausalLM, SparseConfig, SparseDecoder, register
from .masking import projection_shapes

FUSED = {
    "self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "mlp.gate_up_proj": ("gate_proj", "up_proj"),
}


@strict
class SparsePhi3Config(SparseConfig, Phi3Config):
    model_type = "sparse_phi3"


class SparsePhi3Attention(Phi3Attention):
    """Phi-3's attention on three projections."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    # The stock forward calls it like the module that it takes the place of.
    def qkv_proj(self, hidden_states: torch.Tensor) -> torch.Tensor:
        parts = [projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        return torch.cat(parts, dim=-1)


class SparsePhi3Model(SparseDecoder, Phi3Model):
    config_class = SparsePhi3Config

    @classmethod
    def install(cls, model: Any) -> None:
        shapes = projection_shapes(model.config)
        for layer in model.layers:
            layer.self_attn.__class__ = SparsePhi3Attention
            for path, names in FUSED.items():
                home, _, fused = path.partition(".")
                module = getattr(layer, home)
                delattr(module, fused)
                for name in names:
                    rows, columns = shapes[name]
                    linear = nn.Linear(columns, rows, bias=False)
                    model._init_weights(linear)
                    setattr(module, name, linear)
        super().install(model)


class SparsePhi3ForCausalLM(SparseCausalLM, Phi3ForCausalLM):
    config_class = SparsePhi3Config
    decoder_class = SparsePhi3Model


FAMILY = register(Family(SparsePhi3ForCausalLM, {"phi3": Phi3Config}, fused=FUSED))

__all__ = ["SparsePhi3Config", "SparsePhi3ForCausalLM", "SparsePhi3Model"]
