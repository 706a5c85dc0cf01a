"""Weight sparsity of a checkpoint: what its configuration says of it, and the zeros that its projections really have.

`config.weight_sparsity` names the method, the pattern and the share. Unlike a mask (`config.sparsification`) it changes nothing in
how the model is computed: the zeros are in the tensors, and whatever reads the checkpoint computes with them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparsify.conversion.layout import LiveTensor, live_tensors, projection_names
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.source_tensors import read_shapes
from sparsify.models import SparseConfig, SparseModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The matrices of a layer whose weights are set to zero; embedding, output layer, routers and norms stay dense."""


@dataclass(frozen=True)
class WeightSparsity:
    """What a configuration says.

    Attributes:
        method: That set the zeros.
        pattern: `unstructured` or N:M.
        sparsity: Share of the weights of all projections.
    """

    method: str
    pattern: str
    sparsity: float

    @property
    def words(self) -> str:
        kind = "" if self.pattern == "unstructured" else f" ({self.pattern})"
        return f"{self.sparsity:.0%} of the weights zero{kind}, by {self.method}"


def weight_sparsity(config: Any) -> WeightSparsity | None:
    """Of a configuration, be it an object or the fields of config.json; None where weights are dense."""
    fields = config.get("weight_sparsity") if isinstance(config, Mapping) else getattr(config, "weight_sparsity", None)
    return WeightSparsity(**fields) if fields else None


def sparse_tensors(config: SparseConfig) -> dict[str, list[tuple[str, LiveTensor]]]:
    """For each parameter that holds sparse weights, by its name in memory, the tensors on disk that are its parts."""
    live = live_tensors(config)
    parts: dict[str, list[tuple[str, LiveTensor]]] = defaultdict(list)
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            for name in projection_names(config, layer, projection):
                parts[live[name].name].append((name, live[name]))
    return dict(parts)


def part_of(value: torch.Tensor, place: LiveTensor) -> torch.Tensor:
    """The part of a whole parameter that a tensor on disk is."""
    value = value if place.expert is None else value[place.expert]
    return value if place.rows is None else value[place.rows]


@dataclass(frozen=True)
class MatrixZeros:
    """Zeros of one kind of projection in one layer; of all experts together.

    Attributes:
        zeros: Weights that are exactly zero.
        weights: All of them.
    """

    layer: int
    projection: str
    zeros: int
    weights: int

    @property
    def share(self) -> float:
        return self.zeros / self.weights


def count_zeros(config: SparseConfig, read: Callable[[str], torch.Tensor]) -> Iterator[MatrixZeros]:
    """Counts zeros, a matrix in memory at a time.

    Args:
        config: Of the model.
        read: Gives a tensor by its name on disk.
    """
    for layer in range(config.num_hidden_layers):
        for projection in PROJECTIONS:
            zeros = weights = 0
            for name in projection_names(config, layer, projection):
                tensor = read(name)
                zeros += tensor.numel() - int(torch.count_nonzero(tensor))
                weights += tensor.numel()
            yield MatrixZeros(layer, projection, zeros, weights)


def lost_zeros(
    config: SparseConfig, before: Callable[[str], torch.Tensor], after: Callable[[str], torch.Tensor]
) -> dict[str, int]:
    """How many weights of each matrix were zero and are not any more, by its name on disk; only matrices with some."""
    lost = {}
    for parts in sparse_tensors(config).values():
        for name, _ in parts:
            if count := int(torch.count_nonzero(after(name)[before(name) == 0])):
                lost[name] = count
    return lost


def live_reader(model: SparseModel) -> Callable[[str], torch.Tensor]:
    """Reads matrices of a model in memory by their names on disk."""
    parameters, places = dict(model.named_parameters()), live_tensors(model.config)
    return lambda name: part_of(parameters[places[name].name].detach(), places[name])


class TensorReader:
    """Reads tensors of a checkpoint folder by their names on disk."""

    def __init__(self, folder: Path) -> None:
        self._homes = {name: shard for shard in read_checkpoint(folder).shards for name in read_shapes(shard)}

    def __call__(self, name: str) -> torch.Tensor:
        with safe_open(self._homes[name], framework="pt") as tensors:
            return tensors.get_tensor(name)
