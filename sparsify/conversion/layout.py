"""The tensors of a model: names in memory and on disk, and shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sparsify.models import FAMILIES, SparseConfig, family_of, mask_tensors
from sparsify.models.masking import has_experts, num_neurons

LAYER = "model.layers.{}."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = "mlp.experts."


@dataclass(frozen=True)
class LiveTensor:
    """Where a tensor on disk is in memory.

    Attributes:
        name: The parameter or buffer that holds it.
        expert: Which expert's part of it that is; None for all of it.
        rows: Which rows of that part; None for all.
    """

    name: str
    expert: int | None = None
    rows: slice | None = None


def tensor_shapes(config: SparseConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor on disk, in the layout of the family's stock checkpoints."""
    return {name: shape for name, (_, shape) in _tensors(config).items()}


def live_tensors(config: SparseConfig) -> dict[str, LiveTensor]:
    """Where every tensor on disk is in memory."""
    return {name: live for name, (live, _) in _tensors(config).items()}


def _tensors(config: SparseConfig) -> dict[str, tuple[LiveTensor, tuple[int, ...]]]:
    found: dict[str, tuple[LiveTensor, tuple[int, ...]]] = {}
    first, layers = LAYER.format(0), range(config.num_hidden_layers)
    # All layers have the same tensors.
    shapes = _shapes_of_one_layer(config.model_type, json.dumps(_one_layer(config), sort_keys=True, default=str))
    for name, shape in shapes.items():
        if not name.startswith(first):
            found[name] = LiveTensor(name), shape
    for layer in layers:
        prefix = LAYER.format(layer)
        for name, shape in shapes.items():
            if name.startswith(first):
                found |= _on_disk(config, layer, prefix + name.removeprefix(first), shape)
    return found


def _on_disk(
    config: SparseConfig, layer: int, name: str, shape: tuple[int, ...]
) -> dict[str, tuple[LiveTensor, tuple[int, ...]]]:
    last = name.rpartition(".")[2]
    if f".{EXPERTS}" not in name or last not in ("gate_up_proj", "down_proj"):
        return {name_on_disk(config, name): (LiveTensor(name), shape)}
    neurons = num_neurons(config)
    halves: dict[str, slice | None] = {"gate_proj": slice(neurons), "up_proj": slice(neurons, None)}
    parts = halves if last == "gate_up_proj" else {"down_proj": None}
    return {
        path: (LiveTensor(name, expert, part), (shape[1] if part is None else neurons, shape[2]))
        for projection, part in parts.items()
        for expert, path in enumerate(projection_names(config, layer, projection))
    }


def _one_layer(config: SparseConfig) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict() | {"num_hidden_layers": 1}
    if fields.get("layer_types"):
        fields["layer_types"] = fields["layer_types"][:1]
    return fields


@lru_cache(maxsize=8)
def _shapes_of_one_layer(model_type: str, fields: str) -> dict[str, tuple[int, ...]]:
    """Of the model's parameters and stored buffers, in memory."""
    family = FAMILIES[model_type]
    with torch.device("meta"):
        model = family.model(family.config.from_dict(json.loads(fields)))
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def name_on_disk(config: SparseConfig, name: str) -> str:
    """What a tensor in memory that is stored whole is called on disk."""
    if not has_experts(config):
        return name
    return name.replace(".mlp.", f".{family_of(config).blocks_on_disk}.", 1)


def mask_names(config: SparseConfig, layer: int) -> dict[str, dict[str, str]]:
    """Names on disk of what a layer stores of each masked site, by part."""
    prefix = LAYER.format(layer)
    return {
        site: {part: name_on_disk(config, prefix + name) for part, (name, _) in parts.items()}
        for site, parts in mask_tensors(config).items()
    }


def projection_names(config: SparseConfig, layer: int, projection: str) -> list[str]:
    """Names on disk of a projection's weight, such as `gate_proj`; in a mixture of experts one for each expert."""
    prefix = LAYER.format(layer)
    if projection in ATTENTION:
        return [f"{prefix}self_attn.{projection}.weight"]
    if not has_experts(config):
        return [f"{prefix}mlp.{projection}.weight"]
    family = family_of(config)
    name = family.expert_projections[projection]
    return [
        f"{prefix}{family.blocks_on_disk}.experts.{expert}.{name}.weight" for expert in range(config.num_local_experts)
    ]
