from __future__ import annotations

from typing import Any

import pytest
import torch

from sparsify.models import (
    SparseMistralConfig,
    SparseMistralForCausalLM,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseModel,
)

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
Batch = dict[str, torch.Tensor]


def sparse_model(kind: str, activation: str = "drelu", **more: Any) -> SparseModel:
    torch.manual_seed(0)
    model: SparseModel
    if kind == "mistral":
        model = SparseMistralForCausalLM(SparseMistralConfig(**SHAPE | more, ffn_activation=activation))
    else:
        config = SparseMixtralConfig(**SHAPE, ffn_activation=activation, num_local_experts=4, num_experts_per_tok=2)
        model = SparseMixtralForCausalLM(config)
    with torch.no_grad():
        # A direction that all tokens share serves as the bias that makes firing rare.
        model.model.embed_tokens.weight += 0.3
        for layer in model.model.layers:
            # Weights of a norm that are all 1, as they are at the start, would hide a wrong folding.
            layer.post_attention_layernorm.weight.uniform_(0.5, 1.5)
            layer.self_attn.o_proj.weight *= 0.1
        for block in model.ffn_blocks():
            down = getattr(block.down_proj, "weight", block.down_proj)
            down *= 0.2
            _let_few_directions_decide(block)
    return model.eval()


def _let_few_directions_decide(block: Any) -> None:
    """As in trained models; else no predictor that is smaller than the block could know which neurons fire."""
    neurons, hidden = SHAPE["intermediate_size"], SHAPE["hidden_size"]
    fused = getattr(block, "gate_up_proj", None)
    for expert in range(1 if fused is None else len(fused)):
        directions = torch.randn(6, hidden) / hidden**0.5 - 1.3 / hidden
        rows = directions[torch.randint(0, 6, (neurons,))]
        gate = rows * torch.rand(neurons, 1) + 0.03 * torch.randn(neurons, hidden)
        up = rows * torch.rand(neurons, 1) + 0.03 * torch.randn(neurons, hidden)
        if fused is None:
            block.gate_proj.weight.copy_(gate)
            block.up_proj.weight.copy_(up)
        else:
            fused[expert].copy_(torch.cat([gate, up]))


@pytest.fixture(scope="session")
def mistral() -> SparseModel:
    return sparse_model("mistral")


@pytest.fixture(scope="session")
def mixtral() -> SparseModel:
    return sparse_model("mixtral")


def random_batches(count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SHAPE["vocab_size"], (count, 8, 33), generator=generator)
    return [
        {
            "input_ids": one[:, :-1],
            "labels": one[:, 1:],
            "position_ids": torch.arange(32).expand(8, -1),
        }
        for one in ids
    ]
