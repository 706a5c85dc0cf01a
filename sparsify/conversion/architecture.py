"""Which architectures can be held, and as what."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sparsify.errors import ModelError
from sparsify.models import FAMILIES, Family, SparseConfig
from sparsify.models.activations import ACTIVATIONS, STOCK_ACTIVATION

HIDDEN_ACTS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""Kinds of gates by transformers' names of activations."""
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
KEPT_FIELDS = {"layer_types"}
"""Of these, what a family keeps whose configuration has such a field."""


_Size = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]
_Number = Annotated[float, Field(gt=0, le=1e12, allow_inf_nan=False)]
MAX_BLOCKS = 1_000_000
ROPE_NUMBERS = ("short_factor", "long_factor")
"""Settings of the rotary embedding that are lists of numbers, one for each frequency; the others are single ones."""


class _WeightSparsity(BaseModel):
    model_config = ConfigDict(extra="forbid")

    method: str
    pattern: str
    sparsity: Annotated[float, Field(gt=0, lt=1)]


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
    moe_intermediate_size: _Size | None = None
    num_local_experts: Annotated[int, Field(ge=0, le=65_536, strict=True)] | None = None
    num_experts: Annotated[int, Field(ge=0, le=65_536, strict=True)] | None = None
    num_experts_per_tok: Annotated[int, Field(ge=0, le=65_536, strict=True)] | None = None
    sub_dimensions: _Size | None = None
    shared_sub_dimensions: Annotated[int, Field(ge=0, le=10_000_000, strict=True)] | None = None
    active_sub_dimensions: _Size | None = None
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
    weight_sparsity: _WeightSparsity | None = None
    quantisation: dict[str, Any] | None = None
    layer_types: list[str] | None = None
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
        blocks = (self.num_hidden_layers or 1) * (self.num_local_experts or self.num_experts or 1)
        if blocks > MAX_BLOCKS:
            raise ValueError(f"layers x experts is {blocks:,}, more than {MAX_BLOCKS:,}")
        vocabulary, pad = self.vocab_size, self.pad_token_id
        if vocabulary and pad is not None and not -vocabulary <= pad < vocabulary:
            raise ValueError(f"pad_token_id {pad} is not one of {vocabulary} tokens")
        settings = {name: getattr(self, name) or {} for name in ("rope_scaling", "rope_parameters")}
        for kind in {
            *(self.layer_types or ()),
            "full_attention",
            "sliding_attention",
        }:  # a model may have rotary positions of their own for each kind of layer
            for name in [name for name, value in settings.items() if isinstance(value.get(kind), dict)]:
                settings[f"{name}.{kind}"] = settings[name][kind]
                settings[name] = {key: value for key, value in settings[name].items() if key != kind}
        for name, parameters in settings.items():
            for key, value in parameters.items():
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
    family = family_held(config)
    assert family is not None, "checked by held_fields"
    known = {one.name for one in dataclasses.fields(family.config)}
    fields = {key: value for key, value in config.items() if key not in DROPPED_FIELDS or key in KEPT_FIELDS & known}
    fields["ffn_activation"] = ffn_activation
    if gate_threshold is not None:
        fields["ffn_gate_threshold"] = gate_threshold
    with _config_errors(config["model_type"], where):
        return family.config(**fields)


def stored_activation(config: Mapping[str, Any]) -> str:
    """The activation of a checkpoint with that config.json: the one that it names, or what its family's stock ones compute."""
    family = family_held(config)
    return config.get("ffn_activation", STOCK_ACTIVATION if family is None else family.base_activation)


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the language model of a checkpoint, where it holds others, too; otherwise the given one."""
    text = config.get("text_config")
    family = next((one for one in FAMILIES.values() if config.get("model_type") in one.holders), None)
    if family is None or not isinstance(text, dict):
        return config
    outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
    return outer | {"model_type": next(iter(family.stock))} | text


def family_held(config: Mapping[str, Any]) -> Family | None:
    """The family as which a checkpoint with that config.json is held; None if there is none."""
    model_type = str(config.get("model_type"))
    return next((one for one in FAMILIES.values() if model_type == one.model_type or model_type in one.stock), None)


def refuse_integers(config: Mapping[str, Any], where: str) -> None:
    """Raises ModelError if a config.json is of a quantised model, whose weights are not numbers."""
    if stored := config.get("quantisation"):
        raise ModelError(
            f"{where} holds integers instead of weights (config.quantisation, by {stored.get('method')}), which are neither converted "
            "nor trained.",
            next_step="Give the model that it was made from; sparsify convert --method quantises after training.",
        )


def held_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json that can be held here, with its own class's defaults for what it does not have.

    Raises:
        ModelError: If the architecture cannot be held, with the reason.
    """
    check_fields(config, where)
    model_type = str(config.get("model_type"))
    family = family_held(config)
    if family is None:
        name, near = re.sub(r"\W", "_", model_type)[:40], _nearest_family(config)
        raise ModelError(
            f"{where} has model_type {model_type!r}, an architecture that cannot be held. The nearest that can is "
            f"{next(iter(near.stock))!r}.",
            allowed=f"Held: {', '.join(stock_types())}.",
            next_step=f"To hold it, add sparsify/models/sparse_{name}.py: a family is one file, like {near.model_type}.py. "
            "See docs/conversion.md.",
        )
    config = complete_fields(config, where) | {"model_type": model_type}
    reasons = _obstacles(config, family)
    if reasons:
        raise ModelError(
            f"{where} ({model_type}) cannot be held: {'; '.join(reasons)}.",
            allowed=f"Checkpoints of {', '.join(stock_types())}, in full precision, with "
            f"{family.base_activation}, without biases other than the family's own.",
        )
    return config


def _nearest_family(config: Mapping[str, Any]) -> Family:
    """By its name, or else by what its blocks are."""
    named = {name: one for one in FAMILIES.values() if one.stock for name in (*one.stock, one.model_type)}
    close = difflib.get_close_matches(str(config.get("model_type")), named, n=1, cutoff=0.6)
    if close:
        return named[close[0]]
    has_experts = any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    activation = str(config.get("hidden_act", config.get("hidden_activation")))
    is_gelu = HIDDEN_ACTS.get(activation, activation).startswith("gelu")
    return named["qwen3_moe" if has_experts else "gemma3_text" if is_gelu else "llama"]


def stock_types() -> list[str]:
    """Model types of the checkpoints that can be held."""
    return [name for family in FAMILIES.values() for name in family.stock]


def complete_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A config.json with the defaults of its own configuration class for the fields that it does not have; any other architecture's as it is.

    Raises:
        ModelError: If no such model can have these fields.
    """
    family = family_held(config)
    if family is None:
        return dict(config)
    own = family.stock.get(str(config["model_type"]), family.config)
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


def _obstacles(config: dict[str, Any], family: Family) -> list[str]:
    reasons = []
    if config.get("quantization_config"):
        reasons.append("its weights are quantised")
    if config.get("attention_bias") or config.get("mlp_bias"):
        reasons.append("it has biases")
    gate = ACTIVATIONS[family.base_activation].gate
    field = "hidden_activation" if "hidden_activation" in config else "hidden_act"
    activation = config.get(field)
    if config["model_type"] != family.model_type and HIDDEN_ACTS.get(str(activation)) != gate:
        named = next(name for name, kind in HIDDEN_ACTS.items() if kind == gate)
        reasons.append(f"its {field} is {activation!r}, not {named}")
    for field, (value, reason) in family.obstacles.items():
        if config.get(field, value) != value:
            reasons.append(reason)
    return reasons
