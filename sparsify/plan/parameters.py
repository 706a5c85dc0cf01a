"""Parameter counts of a model, by part."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.layout import LAYER, tensor_shapes
from sparsify.errors import ModelError, RecipeError
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.models.masking import hidden_share, num_experts

TRAINED = (".router", ".bias")
"""The tensors of a router of groups that are parameters."""


class Architecture(BaseModel):
    """The configuration fields that determine sizes, under transformers' names."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    num_local_experts: int = 0
    """0 for a dense model."""
    num_experts_per_tok: int = 1
    sub_dimensions: int = 0
    """Parts of the hidden size that tokens are routed to; 0 where every token uses all of it."""
    active_sub_dimensions: int = 0
    attention_extras: int = 0
    """Parameters of one layer's attention in addition to its four projections: biases, norms of queries and keys."""
    layer_norms: int = 2
    """Norms of the hidden size in one layer."""
    group_routers: int = 0
    """Parameters of one layer's routers of groups."""
    mask_values: int = 0
    """Thresholds of the mask that the source stores: buffers, of which every process has its own."""

    zero_share: float = 0.0
    """Share of the weights of all projections that is zero in the source."""

    @classmethod
    def of(cls, fields: Mapping[str, Any], upcycle_experts: int | None, per_token: int) -> Architecture:
        """Reads transformers' config fields of a model that can be held, upcycled into copies of its FFN if that is
        given. Raises RecipeError if a field is missing or of the wrong type.
        """
        known = {key: value for key, value in fields.items() if value is not None}
        known["num_local_experts"] = known.get("num_local_experts") or known.get("num_experts") or 0
        if not known["num_local_experts"]:
            known["num_experts_per_tok"] = 1
        known["intermediate_size"] = known.get("moe_intermediate_size") or known.get("intermediate_size")
        known |= _extras(known)
        if upcycle_experts:
            known |= {"num_local_experts": upcycle_experts, "num_experts_per_tok": per_token}
            known["group_routers"] = known.get("group_routers", 0) * upcycle_experts
        if {"hidden_size", "num_attention_heads"} <= known.keys():
            known.setdefault("head_dim", max(1, known["hidden_size"] // known["num_attention_heads"]))
        try:
            return cls(**known)
        except ValidationError as error:
            faults = [f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors()]
            raise RecipeError(
                f"model.architecture does not describe a model: {'; '.join(faults)}.",
                allowed="The fields of a config.json of an architecture that can be held.",
            ) from error

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together; that of the values is equal."""
        return self.num_key_value_heads * self.head_dim


def _extras(fields: Mapping[str, Any]) -> dict[str, int]:
    """What a layer of the family has in addition to projections, from the tensors of its model; nothing if that cannot be made."""
    try:
        config = sparse_config(dict(fields), STOCK_ACTIVATION, "model.architecture")
    except ModelError:
        return {}
    layer = {name: shape for name, shape in tensor_shapes(config).items() if name.startswith(LAYER.format(0))}
    vectors = {name: shape[0] for name, shape in layer.items() if len(shape) == 1}
    routers = sum(
        math.prod(shape) for name, shape in layer.items() if ".group_router." in name and name.endswith(TRAINED)
    )
    inside = sum(size for name, size in vectors.items() if ".self_attn." in name)
    norms = sum(".self_attn." not in name and name.endswith("norm.weight") for name in vectors)
    return {"attention_extras": inside, "layer_norms": norms, "group_routers": routers}


class Parameters(BaseModel):
    """Number of parameters by part. A tied head counts once, as embeddings."""

    model_config = ConfigDict(frozen=True)

    embeddings: int
    attention: int
    gate: int
    up: int
    down: int
    group_routers: int
    router: int
    norms: int
    head: int
    fusion: int = 0
    """Matrices that spread what a block wrote over all sub-dimensions."""

    @computed_field
    @property
    def total(self) -> int:
        return self.shared + self.gate + self.up + self.down + self.group_routers

    @property
    def shared(self) -> int:
        return self.embeddings + self.attention + self.router + self.norms + self.head + self.fusion

    def active(self, architecture: Architecture) -> int:
        """Parameters used for one token: `num_experts_per_tok` of the experts and all other parts; of matrices that read or write
        sub-dimensions, the rows or columns of those that are active.
        """
        routed = self.attention + self.fusion + self._experts_of_token(architecture)
        return self.multiplied(architecture) - routed + round(hidden_share(architecture) * routed)

    def multiplied(self, architecture: Architecture) -> int:
        """Parameters that training multiplies a token with, or looks up: sub-dimensions that are not active are zeros in whole products."""
        return self.shared + self._experts_of_token(architecture)

    def _experts_of_token(self, architecture: Architecture) -> int:
        experts = num_experts(architecture)
        return (self.gate + self.up + self.down + self.group_routers) // experts * architecture.num_experts_per_tok


def count_parameters(architecture: Architecture) -> Parameters:
    """Counts parameters by formula; a test compares it with transformers' models on the meta device."""
    a = architecture
    matrix = a.num_hidden_layers * num_experts(a) * a.hidden_size * a.intermediate_size
    return Parameters(
        embeddings=a.vocab_size * a.hidden_size,
        attention=a.num_hidden_layers * (2 * a.hidden_size * (a.query_size + a.key_value_size) + a.attention_extras),
        gate=matrix,
        up=matrix,
        down=matrix,
        group_routers=a.num_hidden_layers * a.group_routers,
        router=a.num_hidden_layers * (a.num_local_experts + 2 * a.sub_dimensions) * a.hidden_size,
        norms=(a.layer_norms * a.num_hidden_layers + 1) * a.hidden_size,
        head=0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size,
        fusion=_fusion(a),
    )


def _fusion(a: Architecture) -> int:
    if not a.sub_dimensions:
        return 0
    width = a.hidden_size // a.sub_dimensions
    return 2 * a.num_hidden_layers * a.hidden_size * (width + a.sub_dimensions)
