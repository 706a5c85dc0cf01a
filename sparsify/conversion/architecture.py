"""Which architectures can be held, as what, and which tensors they have on disk."""

from __future__ import annotations

from typing import Any

from huggingface_hub.errors import StrictDataclassError

from sparsify.errors import ModelError, nearest
from sparsify.models import (
    CONFIG_CLASSES,
    SparseConfig,
    SparseMistralConfig,
    SparseMixtralConfig,
    mask_tensors,
)

HELD_AS = {
    "mistral": SparseMistralConfig,
    "llama": SparseMistralConfig,
    "mixtral": SparseMixtralConfig,
    **CONFIG_CLASSES,
}
DROPPED_FIELDS = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "hidden_act",
    "torch_dtype",
    "dtype",
    "pretraining_tp",
    "attention_bias",
    "mlp_bias",
    "layer_types",
)


def sparse_config(
    config: dict[str, Any], ffn_activation: str, where: str, gate_threshold: float | None = None
) -> SparseConfig:
    """The configuration under which a checkpoint is held here.

    Raises:
        ModelError: If the architecture cannot be held, with the reason.
    """
    model_type = str(config.get("model_type"))
    if model_type not in HELD_AS:
        raise ModelError(
            f"{where} has model_type {model_type!r}, an architecture that cannot be held.",
            allowed=f"{nearest(model_type, HELD_AS)}Held: mistral, mixtral, and llama without biases.",
        )
    reasons = _obstacles(config, model_type)
    if reasons:
        raise ModelError(
            f"{where} ({model_type}) cannot be held: {'; '.join(reasons)}.",
            allowed="Mistral, Mixtral, and Llama checkpoints with SwiGLU, without biases, in full precision.",
        )
    fields = {key: value for key, value in config.items() if key not in DROPPED_FIELDS}
    fields["ffn_activation"] = ffn_activation
    if gate_threshold is not None:
        fields["ffn_gate_threshold"] = gate_threshold
    if model_type == "llama":
        fields["sliding_window"] = None
    try:
        return HELD_AS[model_type](**fields)
    except (StrictDataclassError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ModelError(
            f"{where} ({model_type}) is not configured as any such model can be: {reason}",
            next_step="Correct the field that the message names in config.json or model.architecture.",
        ) from error


def _obstacles(config: dict[str, Any], model_type: str) -> list[str]:
    reasons = []
    if config.get("quantization_config"):
        reasons.append("its weights are quantised")
    if config.get("attention_bias") or config.get("mlp_bias"):
        reasons.append("it has biases")
    activation = config.get("hidden_act", "silu")
    if model_type not in CONFIG_CLASSES and activation not in ("silu", "swish"):
        reasons.append(f"its hidden_act is {activation!r}, not silu")
    return reasons


def tensor_shapes(config: SparseConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor on disk, in the layout of stock Mistral and Mixtral checkpoints."""
    hidden, head_dim = (
        config.hidden_size,
        config.head_dim or config.hidden_size // config.num_attention_heads,
    )
    queries, keys = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    shapes = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            f"{prefix}self_attn.q_proj.weight": (queries, hidden),
            f"{prefix}self_attn.k_proj.weight": (keys, hidden),
            f"{prefix}self_attn.v_proj.weight": (keys, hidden),
            f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        }
        shapes |= _ffn_shapes(config, prefix)
        masks = mask_tensors(config)
        shapes |= {mask_name(config, layer, site): shape for site, (_, shape) in masks.items()}
    return shapes


def mask_name(config: SparseConfig, layer: int, site: str) -> str:
    """Name on disk of the thresholds of a masked site of a layer."""
    name = mask_tensors(config)[site][0]
    return f"model.layers.{layer}.{name.replace('mlp.experts.', 'block_sparse_moe.experts.')}"


def _ffn_shapes(config: SparseConfig, prefix: str) -> dict[str, tuple[int, ...]]:
    hidden, neurons = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(config, SparseMistralConfig):
        return shapes | {
            f"{prefix}mlp.gate_proj.weight": (neurons, hidden),
            f"{prefix}mlp.up_proj.weight": (neurons, hidden),
            f"{prefix}mlp.down_proj.weight": (hidden, neurons),
        }
    shapes[f"{prefix}block_sparse_moe.gate.weight"] = (config.num_local_experts, hidden)
    for expert in range(config.num_local_experts):
        name = f"{prefix}block_sparse_moe.experts.{expert}."
        shapes |= {
            f"{name}w1.weight": (neurons, hidden),
            f"{name}w3.weight": (neurons, hidden),
            f"{name}w2.weight": (hidden, neurons),
        }
    return shapes
