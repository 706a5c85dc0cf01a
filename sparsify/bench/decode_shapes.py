"""Models of random weights in the shapes of known models, in which a given share of neurons fires."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers.initialization import no_init_weights

from sparsify.bench.decode_blocks import SIGN
from sparsify.models import SparseMistralConfig, SparseMistralForCausalLM, SparseMixtralConfig, SparseMixtralForCausalLM
from sparsify.models.masking import is_fused
from sparsify.runtime import Predictor
from sparsify.runtime.weights import LayerPredictors

LARGE = 100.0
"""One channel of every hidden state, far larger than the others: the column of a projection for it decides the signs. It is channel 0
or, with several kinds of tokens, that of the token's kind."""


SIZE, PERIOD = 0.001, 4_194_301
"""Standard deviation of the other weights, which repeat after so many (a prime number): drawing billions takes minutes."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Args:
        layers: Layers that are measured unless another number is requested: as many as the model has, or as fit in small memory.
        heads: Heads of queries, and of keys and values.
        experts: Experts of a layer, and those that a token is routed to; None in a dense model.
        tied: Whether the output layer is the input embedding.
    """

    hidden: int
    neurons: int
    layers: int
    heads: tuple[int, int]
    vocabulary: int
    experts: tuple[int, int] | None = None
    tied: bool = False


SHAPES = {
    "mistral-7b": Shape(4096, 14336, 4, (32, 8), 32_000),
    "mixtral-8x7b": Shape(4096, 14336, 1, (32, 8), 32_000, experts=(8, 2)),
    "llama-3.2-1b": Shape(2048, 8192, 16, (32, 8), 128_256, tied=True),
    "smollm2-135m": Shape(576, 1536, 30, (9, 3), 49_152, tied=True),
}
"""Sources: config.json of mistralai/Mistral-7B-v0.1, mistralai/Mixtral-8x7B-v0.1, meta-llama/Llama-3.2-1B and
HuggingFaceTB/SmolLM2-135M."""


def random_model(
    shape: Shape,
    layers: int,
    active: float,
    gates: float,
    rank: int,
    dtype: torch.dtype,
    *,
    kinds: int = 1,
    overlap: float = 0.0,
) -> tuple[Any, LayerPredictors]:
    """A model of random weights in which the shares `active` of the neurons and `gates` of the gates are positive, with predictors.

    In a mixture of experts the router is random, so that tokens have different experts. A token's kind, its id modulo `kinds`, decides
    which neurons fire; the share `overlap` of them is common to all kinds, and the others are drawn independently.
    """
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            model = _model(shape, layers)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    drawn = torch.randn(PERIOD).mul_(SIZE).to(dtype)
    for matrix in (one.data.view(-1) for one in model.parameters() if one.dim() > 1):
        for piece in matrix.split(PERIOD):
            piece.copy_(drawn[: len(piece)])
    embedding = model.get_input_embeddings().weight.data
    embedding[:, :kinds] = 0.0
    for kind in range(kinds):
        embedding[kind::kinds, kind] = LARGE
    predictors = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data[:kinds] = 0.0
    for block in model.ffn_blocks():
        experts = [_matrices(block, index) for index in range(len(block.gate_up_proj) if is_fused(block) else 1)]
        predictors.append([_fire(*matrices, active, gates, rank, kinds, overlap) for matrices in experts])
    if shape.experts:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[:, :kinds] = 0.0
    return model, LayerPredictors("normed", predictors)


def drop_weights(model: Any, share: float) -> None:
    """Sets a share of the weights of all projections to zero, wherever they are, but for the columns that decide which neurons fire."""
    generator = torch.Generator().manual_seed(1)
    is_zero = torch.rand(PERIOD, generator=generator) < share
    for layer in model.model.layers:
        for name, matrix in layer.named_parameters():
            if "_proj" in name:
                kept = matrix.data[..., :1].clone()
                for piece in matrix.data.view(-1).split(PERIOD):
                    piece.masked_fill_(is_zero[: len(piece)], 0.0)
                matrix.data[..., :1] = kept
    model.config.weight_sparsity = {"method": "random", "pattern": "unstructured", "sparsity": share}


def _model(shape: Shape, layers: int) -> Any:
    heads, kv_heads = shape.heads
    common: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": shape.hidden // heads,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4096,
        "sliding_window": None,
        "ffn_activation": "drelu",
    }
    if shape.experts is None:
        return SparseMistralForCausalLM(SparseMistralConfig(**common)).eval()
    experts, per_token = shape.experts
    config = SparseMixtralConfig(**common, num_local_experts=experts, num_experts_per_tok=per_token)
    return SparseMixtralForCausalLM(config).eval()


def _matrices(block: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate and up [neurons, hidden], and down [hidden, neurons]."""
    if is_fused(block):
        gate, up = block.gate_up_proj.data[expert].chunk(2)
        return gate, up, block.down_proj.data[expert]
    return block.gate_proj.weight.data, block.up_proj.weight.data, block.down_proj.weight.data


def _fire(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    active: float,
    gates: float,
    rank: int,
    kinds: int,
    overlap: float,
) -> Predictor:
    """Decides which gates and neurons of a block are positive for each kind of tokens; its perfect predictor."""
    neurons, hidden = gate.shape
    common = torch.randperm(neurons)[: round(overlap * active * neurons)]
    for kind in range(kinds):
        drawn = torch.randperm(neurons)
        order = torch.cat([common, drawn[~torch.isin(drawn, common)]])
        for projection, share in ((gate, gates), (up, active)):
            column = torch.full((neurons,), -SIGN)
            column[order[: round(share * neurons)]] = SIGN
            projection[:, kind] = column
    # What a block adds stays small, and nothing is added to the deciding channels: their signs decide in every layer.
    down.mul_(1e-4)[:kinds] = 0.0
    a = torch.rand(rank, hidden, dtype=gate.dtype) * 1e-4
    a[:kinds, :kinds] = torch.eye(kinds)
    b = torch.rand(neurons, rank, dtype=gate.dtype) * 1e-4
    b[:, :kinds] = up[:, :kinds]
    return Predictor(a, b, 0.0)
