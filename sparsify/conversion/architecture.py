"""Which architectures can be held, as what, and which tensors they have on disk."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from transformers import LlamaConfig, MistralConfig, MixtralConfig

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
OWN_CLASSES = {"mistral": MistralConfig, "llama": LlamaConfig, "mixtral": MixtralConfig, **CONFIG_CLASSES}
"""The classes whose defaults apply to the fields that a config.json does not have."""
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
    "transformers_weights",
)


_Size = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]
_Number = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
MAX_BLOCKS = 1_000_000
ROPE_NUMBERS = ("short_factor", "long_factor")
"""Settings of the rotary embedding that are lists of numbers, one for each frequency; the others are single ones."""


class _Sizes(BaseModel):
    """The fields of a config.json that memory and time follow from, and others that transformers does not check."""

    model_config = ConfigDict(extra="ignore")

    vocab_size: _Size | None = None
    hidden_size: _Size | None = None
    intermediate_size: _Size | None = None
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000, strict=True)] | None = None
    num_attention_heads: _Size | None = None
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=65_536, strict=True)] | None = None
    num_experts_per_tok: Annotated[int, Field(ge=0, le=65_536, strict=True)] | None = None
    max_position_embeddings: Annotated[int, Field(ge=1, le=1 << 40, strict=True)] | None = None
    sliding_window: Annotated[int, Field(ge=1, le=1 << 40, strict=True)] | None = None
    pad_token_id: Annotated[int, Field(strict=True)] | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, le=1)] | None = None
    initializer_range: Annotated[float, Field(ge=0, le=1e6)] | None = None
    rope_theta: _Number | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    sparsification: dict[str, Any] | None = None
    ffn_activation: str | None = None
    ffn_gate_threshold: Annotated[float, Field(ge=0, le=1e6)] | None = None

    @model_validator(mode="after")
    def _together(self) -> _Sizes:
        hidden, heads = self.hidden_size, self.num_attention_heads
        if hidden and heads and not self.head_dim and hidden % heads:
            raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        if heads and self.num_key_value_heads and heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {heads} is not a multiple of {self.num_key_value_heads} key-value heads"
            )
        blocks = (self.num_hidden_layers or 1) * (self.num_local_experts or 1)
        if blocks > MAX_BLOCKS:
            raise ValueError(f"layers x experts is {blocks:,}, more than {MAX_BLOCKS:,}")
        vocabulary, pad = self.vocab_size, self.pad_token_id
        if vocabulary and pad is not None and not -vocabulary <= pad < vocabulary:
            raise ValueError(f"pad_token_id {pad} is not one of {vocabulary} tokens")
        for name in ("rope_scaling", "rope_parameters"):
            for key, value in (getattr(self, name) or {}).items():
                numbers = value if key in ROPE_NUMBERS and isinstance(value, list) else [value]
                named = key in ("type", "rope_type")
                if named and not isinstance(value, str):
                    raise ValueError(f"{name}.{key} is {value!r}, not a name")
                if not named and not all(isinstance(one, bool) or _is_number(one) for one in numbers):
                    raise ValueError(f"{name}.{key} is {value!r}, not a number above 0")
        return self


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 < value <= 1e12


def check_fields(config: Mapping[str, Any], where: str) -> None:
    """Refuses sizes that no model has, and fields of another kind than transformers computes with.

    Raises:
        ModelError: Naming the first such field of config.json, or of model.architecture.
    """
    try:
        _Sizes.model_validate(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        said = first["msg"].removeprefix("Value error, ")
        raise ModelError(
            f"{where} is not configured as any model can be: "
            + (f"{field} is {str(first['input'])[:80]!r}: {said}." if field else f"{said}."),
            next_step="Correct that field in config.json or model.architecture.",
        ) from error


def sparse_config(
    config: dict[str, Any], ffn_activation: str, where: str, gate_threshold: float | None = None
) -> SparseConfig:
    """The configuration under which a checkpoint is held here.

    Raises:
        ModelError: If the architecture cannot be held, with the reason.
    """
    config = held_fields(config, where)
    model_type = config["model_type"]
    fields = {key: value for key, value in config.items() if key not in DROPPED_FIELDS}
    fields["ffn_activation"] = ffn_activation
    if gate_threshold is not None:
        fields["ffn_gate_threshold"] = gate_threshold
    if model_type == "llama":
        fields["sliding_window"] = None
    with _config_errors(model_type, where):
        return HELD_AS[model_type](**fields)


def held_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json that can be held here, with its own class's defaults for what it does not have.

    Raises:
        ModelError: If the architecture cannot be held, with the reason.
    """
    check_fields(config, where)
    model_type = str(config.get("model_type"))
    if model_type not in HELD_AS:
        raise ModelError(
            f"{where} has model_type {model_type!r}, an architecture that cannot be held.",
            allowed=f"{nearest(model_type, HELD_AS)}Held: mistral, mixtral, and llama without biases.",
        )
    config = complete_fields(config, where) | {"model_type": model_type}
    reasons = _obstacles(config, model_type)
    if reasons:
        raise ModelError(
            f"{where} ({model_type}) cannot be held: {'; '.join(reasons)}.",
            allowed="Mistral, Mixtral, and Llama checkpoints with SwiGLU, without biases, in full precision.",
        )
    return config


def complete_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json with the defaults of its own configuration class for the fields that it does not have; any other architecture's as it is.

    Raises:
        ModelError: If no such model can have these fields.
    """
    own = OWN_CLASSES.get(str(config.get("model_type")))
    if own is None:
        return dict(config)
    quantised = {key: value for key, value in config.items() if key == "quantization_config" and value}
    given = {key: value for key, value in config.items() if key != "quantization_config"}
    with _config_errors(own.model_type, where):
        return own.from_dict(given).to_dict() | quantised


@contextmanager
def _config_errors(model_type: str, where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers computes with fields of any type before it checks them
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
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
        names = mask_names(config, layer)
        for site, parts in mask_tensors(config).items():
            shapes |= {names[site][part]: shape for part, (_, shape) in parts.items()}
    return shapes


def mask_names(config: SparseConfig, layer: int) -> dict[str, dict[str, str]]:
    """Names on disk of what a layer stores of each masked site, by part."""

    def on_disk(name: str) -> str:
        return f"model.layers.{layer}.{name.replace('mlp.experts.', 'block_sparse_moe.experts.')}"

    return {
        site: {part: on_disk(name) for part, (name, _) in parts.items()} for site, parts in mask_tensors(config).items()
    }


def projection_names(config: SparseConfig, layer: int, projection: str) -> list[str]:
    """Names on disk of a projection's weight, such as `gate_proj`; in a mixture of experts one for each expert."""
    prefix = f"model.layers.{layer}."
    if projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
        return [f"{prefix}self_attn.{projection}.weight"]
    if isinstance(config, SparseMistralConfig):
        return [f"{prefix}mlp.{projection}.weight"]
    name = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[projection]
    return [f"{prefix}block_sparse_moe.experts.{e}.{name}.weight" for e in range(config.num_local_experts)]


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
