"""Folders of models of random weights in the shapes of known models, written layer by layer, in which tokens fire given neurons."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sparsify.bench.decode_blocks import SIGN
from sparsify.bench.decode_shapes import LARGE, PERIOD, SHAPES, SIZE, random_model
from sparsify.files import write_json
from sparsify.models.masking import has_experts, num_experts
from sparsify.runtime import Predictor
from sparsify.runtime.weights import LayerPredictors

KINDS = 32
"""A token's id modulo this decides which neurons fire for it."""
DONE = "offload_model.json"


@dataclass(frozen=True)
class Firing:
    """Which neurons fire.

    Attributes:
        active: Share of the neurons that fire for a token; their gates decide alone.
        skew: 0 if all are equally likely; otherwise the weight of the n-th most likely one is n to the power of -skew.
    """

    active: float
    skew: float

    def drawn(self, layer: int, expert: int, neurons: int) -> torch.Tensor:
        """Neurons of each kind of tokens, bool [KINDS, neurons]."""
        generator = torch.Generator().manual_seed(1 + layer * 1000 + expert)
        ranks = torch.randperm(neurons, generator=generator) + 1.0
        # The largest of weighted exponential races are a sample without replacement (Efraimidis and Spirakis).
        races = torch.rand(KINDS, neurons, generator=generator).log() * ranks**self.skew
        chosen = races.topk(round(self.active * neurons), dim=1).indices
        return torch.zeros(KINDS, neurons, dtype=torch.bool).scatter_(1, chosen, True)


def write_model(folder: Path, shape: str, layers: int, firing: Firing, on_progress: Callable[[str], object]) -> None:
    """Writes a model in bf16, unless it is there: one layer at a time in memory."""
    wanted = {"shape": shape, "layers": layers, "firing": asdict(firing)}
    if (folder / DONE).is_file() and json.loads((folder / DONE).read_text()) == wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DONE).unlink(missing_ok=True)
    on_progress(f"Making a layer of {shape}")
    model, _ = random_model(SHAPES[shape], 1, firing.active, firing.active, KINDS, torch.bfloat16, kinds=KINDS)
    model.config.num_hidden_layers = layers
    model.config.save_pretrained(folder)
    every = dict(model.named_parameters())
    for name, embedding in every.items():
        if name == "model.embed_tokens.weight":
            embedding.data[:, :KINDS] = 0.0
            for kind in range(KINDS):
                embedding.data[kind::KINDS, kind] = LARGE
    first = "model.layers.0."
    _save({name: one for name, one in every.items() if not name.startswith(first)}, folder / "model-rest.safetensors")
    for layer in range(layers):
        on_progress(f"Writing layer {layer + 1} of {layers}")
        _decide(model, layer, firing)
        own = {
            name.replace(first, f"model.layers.{layer}."): one for name, one in every.items() if name.startswith(first)
        }
        _save(own, folder / f"model-layer-{layer:03}.safetensors")
    write_json(folder / DONE, wanted)


def _save(tensors: dict[str, Any], path: Path) -> None:
    save_file({name: one.detach().contiguous() for name, one in tensors.items()}, path, metadata={"format": "pt"})


def _decide(model: Any, layer: int, firing: Firing) -> None:
    """Makes the columns of gate and up for the kinds of tokens those of a layer."""
    block = model.ffn_blocks()[0]
    for expert in range(num_experts(model.config)):
        if has_experts(model.config):
            gate, up = block.gate_up_proj.data[expert].chunk(2)
        else:
            gate, up = block.gate_proj.weight.data, block.up_proj.weight.data
        signs = torch.where(firing.drawn(layer, expert, len(gate)), SIGN, -SIGN).T.to(gate.dtype)
        gate[:, :KINDS] = up[:, :KINDS] = signs


def perfect_predictors(config: Any, firing: Firing, rank: int) -> LayerPredictors:
    """Predictors of this rank that know which neurons fire."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(PERIOD, generator=generator).mul_(SIZE / 10).to(torch.bfloat16)

    def filled(rows: int, columns: int) -> torch.Tensor:
        return noise.repeat(-(-rows * columns // PERIOD))[: rows * columns].view(rows, columns).clone()

    layers = []
    for layer in range(config.num_hidden_layers):
        experts = []
        for expert in range(num_experts(config)):
            a, b = filled(rank, config.hidden_size), filled(config.intermediate_size, rank)
            a[:KINDS] = 0.0
            a[:KINDS, :KINDS] = torch.eye(KINDS)
            fires = firing.drawn(layer, expert, config.intermediate_size)
            b[:, :KINDS] = torch.where(fires, 1.0, -1.0).T.to(b.dtype)
            experts.append(Predictor(a, b, 0.0))
        layers.append(experts)
    return LayerPredictors("normed", layers)
