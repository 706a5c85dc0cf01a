from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sparsify.models import (
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseModel,
)

BuildModel = Callable[..., SparseModel]
SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture
def build_model() -> BuildModel:
    def build(kind: str = "mistral", activation: str = "drelu", dtype: torch.dtype = torch.float32) -> SparseModel:
        torch.manual_seed(0)
        model: SparseModel
        if kind == "mistral":
            model = SparseMistralForCausalLM(SparseMistralConfig(**SHAPE, ffn_activation=activation))
        else:
            config = SparseMixtralConfig(**SHAPE, ffn_activation=activation, num_local_experts=4, num_experts_per_tok=2)
            model = SparseMixtralForCausalLM(config)
        nn.Module.to(model, dtype)
        return model.eval()

    return build


@pytest.fixture
def input_ids() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE["vocab_size"], (4, 12), generator=generator)
