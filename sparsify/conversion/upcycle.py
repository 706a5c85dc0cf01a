"""Dense Mistral → Mixtral, without changing its function."""

from __future__ import annotations

import torch

from sparsify.errors import ModelError
from sparsify.models import (
    SparseConfig,
    SparseMistralConfig,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseModel,
)

DENSE_ONLY_FIELDS = ("model_type", "architectures", "auto_map", "dtype", "transformers_version")


def check_dense(config: SparseConfig, num_experts: int) -> None:
    """Refuses to upcycle what has experts already.

    Raises:
        ModelError: If the configuration is that of a Mixtral.
    """
    if not isinstance(config, SparseMistralConfig):
        raise ModelError(
            f"model.upcycle_experts is {num_experts}, but the model is {config.model_type} already.",
            allowed="Only a dense model can be turned into one with experts.",
            next_step="Leave model.upcycle_experts out.",
        )


def upcycle(
    dense: SparseModel, num_experts: int, num_experts_per_token: int, seed: int
) -> SparseMixtralForCausalLM:
    """Copies every feed-forward block into `num_experts` experts (sparse upcycling, arXiv 2212.05055).

    The router's weights are drawn anew; since Mixtral's router weights sum to 1 over the chosen experts and the
    experts are equal, the function is that of the dense model to rounding until training sets them apart.

    Args:
        dense: A sparse_mistral model, any activation.
        num_experts: Experts of every layer.
        num_experts_per_token: Experts that each token is routed to.
        seed: Seed of the routers.

    Raises:
        ModelError: If the model has experts already.
    """
    check_dense(dense.config, num_experts)
    fields = {
        key: value for key, value in dense.config.to_dict().items() if key not in DENSE_ONLY_FIELDS
    }
    config = SparseMixtralConfig(
        **fields, num_local_experts=num_experts, num_experts_per_tok=num_experts_per_token
    )
    torch.manual_seed(seed)
    model = SparseMixtralForCausalLM(config)
    model.to(dtype=dense.dtype)  # pyright: ignore[reportCallIssue]
    state, source = model.state_dict(), dense.state_dict()
    for key, value in source.items():
        if ".mlp." not in key:
            state[key].copy_(value)
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.experts."
        gate_up = torch.cat([source[f"{old}gate_proj.weight"], source[f"{old}up_proj.weight"]])
        state[f"{new}gate_up_proj"].copy_(gate_up.expand(num_experts, -1, -1))
        if config.ffn_thresholds == "neuron":
            threshold = "ffn_activation.threshold"
            state[f"{new}{threshold}"].copy_(source[f"{old}{threshold}"].expand(num_experts, -1))
        state[f"{new}down_proj"].copy_(source[f"{old}down_proj.weight"].expand(num_experts, -1, -1))
    return model.eval()
