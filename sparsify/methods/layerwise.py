"""A checkpoint one layer at a time: only that layer's weights are in memory, in fp32, on the GPU where there is one.

The residual stream of the calibration sequences between two layers, on the disk.

Only one layer's streams are kept: those of a layer take the place of those before it when the layer is done, so that a
interrupted calibration resumes with the current layer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from sparsify.conversion.architecture import sparse_config, tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.source_tensors import read_shapes
from sparsify.models import (
    MODEL_CLASSES,
    FfnActivation,
    SparseConfig,
    SparseMistralConfig,
    ThresholdMask,
)
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.models.masking import drop_small, num_experts


@dataclass(frozen=True)
class Expert:
    """A feed-forward block, or one expert of it.

    Attributes:
        gate: [neurons, hidden].
        up: [neurons, hidden].
        down: [hidden, neurons].
        activation: Its thresholds, if any, are this expert's: [1] or [neurons].
        input_threshold: Of a mask on its inputs, [1] or [hidden].
    """

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    activation: FfnActivation
    input_threshold: torch.Tensor | None = None

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """Neuron activations [rows, neurons] of inputs [rows, hidden]."""
        x = self.seen(x)
        return self.activation(x @ self.gate.T, x @ self.up.T)

    def gates(self, x: torch.Tensor) -> torch.Tensor:
        """The gate's factor before its mask, [rows, neurons]."""
        return self.activation.gate_factor(self.seen(x) @ self.gate.T)

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.input_threshold is None else drop_small(x, self.input_threshold)

    def with_mask(self, site: str, threshold: torch.Tensor) -> Expert:
        """The expert with a mask on one of its sites, `ffn_in`, `gate` or `inter`: a threshold [1] or [channels]."""
        if site == "ffn_in":
            return replace(self, input_threshold=threshold)
        old = self.activation
        new = FfnActivation(old.name, old.gate_threshold).with_masks_of(old)
        if site == "gate":
            new.gate_mask = ThresholdMask(tuple(threshold.shape))
            new.gate_mask.threshold = threshold
        else:
            new.threshold = threshold
        return replace(self, activation=new)


@dataclass(frozen=True)
class Routes:
    """Which experts each token goes to; a dense block is one expert of weight 1.

    Attributes:
        experts: [tokens, experts per token].
        weights: Of the same shape.
    """

    experts: torch.Tensor
    weights: torch.Tensor

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of one expert, and their weights. [rows] each."""
        token, slot = torch.where(self.experts == expert)
        return token, self.weights[token, slot]


def ffn_names(config: SparseConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """Names on disk of one expert's gate, up and down projection."""
    prefix = f"model.layers.{layer}."
    if isinstance(config, SparseMistralConfig):
        return tuple(f"{prefix}mlp.{part}_proj.weight" for part in ("gate", "up", "down"))  # type: ignore[return-value]
    name = f"{prefix}block_sparse_moe.experts.{expert}."
    return f"{name}w1.weight", f"{name}w3.weight", f"{name}w2.weight"


@dataclass(frozen=True)
class Inputs:
    """What a layer's feed-forward block sees and what it should compute, a chunk of sequences at a time.

    Attributes:
        x: Its inputs, [tokens, hidden].
        gap: What every expert should add to what it computed when dense, [tokens, hidden].
        fit: Tokens that a method may look at, bool [tokens].
        held_out: Held-out tokens, bool [tokens].
    """

    x: torch.Tensor
    routes: Routes
    gap: torch.Tensor
    fit: torch.Tensor
    held_out: torch.Tensor


InputsOf = Callable[[], Iterator[Inputs]]


@dataclass(frozen=True)
class Layer:
    """A layer as a method rewrites it.

    Attributes:
        dtype: Dtype on disk: what is fitted is rounded to it before it is evaluated.
        inputs: Gives all calibration tokens, again on each call.
    """

    dense: list[Expert]
    replaced: list[Expert]
    dtype: torch.dtype
    inputs: InputsOf


def stored_threshold(threshold: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A threshold in fp32, rounded as it will be stored."""
    return threshold.clamp(max=torch.finfo(dtype).max).to(dtype).float()


class Attention:
    """A layer without its feed-forward block, and the router of that.

    Attributes:
        masks: Thresholds of the sites `attn_in` and `attn_out`; empty for none.
    """

    def __init__(self, config: SparseConfig, device: torch.device) -> None:
        one_layer = deepcopy(config)
        one_layer.num_hidden_layers = 1
        with torch.device("meta"):
            decoder: Any = MODEL_CLASSES[config.model_type](one_layer).model
        layer = decoder.layers[0]
        self._router = getattr(layer.mlp, "gate", None)
        layer.mlp, decoder.norm, decoder.embed_tokens = _Nothing(), nn.Identity(), nn.Identity()
        layer.to_empty(device=device)
        if self._router is not None:
            self._router.to_empty(device=device)
        # Without a feed-forward block it applies no activation: the model's own check of its experts has nothing to look at.
        decoder.config.ffn_activation, decoder.config.sparsification = STOCK_ACTIVATION, None
        decoder.rotary_emb = type(decoder.rotary_emb)(config=one_layer).to(device)
        self._decoder, self._layer = decoder.float().eval(), layer
        self.masks: dict[str, torch.Tensor] = {}
        self._seen: dict[str, torch.Tensor] = {}
        attention = layer.self_attn
        attention.register_forward_pre_hook(self._mask_input, with_kwargs=True)
        attention.o_proj.register_forward_pre_hook(lambda _, args: (self._masked("attn_out", args[0]),))

    def _mask_input(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = self._masked("attn_in", kwargs["hidden_states"])
        return args, kwargs | {"hidden_states": hidden}

    def _masked(self, site: str, values: torch.Tensor) -> torch.Tensor:
        self._seen[site] = values
        return drop_small(values, self.masks[site]) if site in self.masks else values

    def values(self, site: str, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The values of `attn_in` or `attn_out` before their mask, [sequences, tokens, channels]; arguments as of a call."""
        self(hidden, position_ids)
        return self._seen[site]

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the weights of a layer, by their names inside it; those of feed-forward blocks are ignored."""
        for name, parameter in self._layer.named_parameters():
            parameter.data.copy_(tensors[name])
        if self._router is not None:
            self._router.float().weight.data.copy_(tensors["block_sparse_moe.gate.weight"])

    def __call__(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the feed-forward block, [sequences, tokens, hidden], from that before the layer."""
        return self._decoder(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state

    def ffn_inputs(self, residual: torch.Tensor) -> torch.Tensor:
        """What the feed-forward block sees, [sequences * tokens, hidden]."""
        return self._layer.post_attention_layernorm(residual).flatten(0, -2)

    def routes(self, x: torch.Tensor) -> Routes:
        if self._router is None:
            zeros = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
            return Routes(zeros, torch.ones_like(zeros, dtype=x.dtype))
        _, weights, experts = self._router(x)
        return Routes(experts, weights)


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class LayerReader:
    def __init__(self, folder: Path, device: torch.device) -> None:
        checkpoint = read_checkpoint(folder)
        name = checkpoint.config.get("ffn_activation", STOCK_ACTIVATION)
        self.config = sparse_config(checkpoint.config, name, str(folder))
        self.device = device
        self._shards = {key: shard for shard in checkpoint.shards for key in read_shapes(shard)}
        self._attention = Attention(self.config, device)

    @property
    def num_experts(self) -> int:
        return num_experts(self.config)

    def attention(self, layer: int) -> Attention:
        """The layer without its feed-forward block; one object, which holds the newest layer."""
        prefix = f"model.layers.{layer}."
        wanted = [key for key in tensor_shapes(self.config) if key.startswith(prefix)]
        skipped = {name for e in range(self.num_experts) for name in ffn_names(self.config, layer, e)}
        kept = [key for key in wanted if key not in skipped]
        self._attention.load({key.removeprefix(prefix): self._read(key) for key in kept})
        return self._attention

    def experts(self, layer: int, activation: FfnActivation) -> list[Expert]:
        names = [ffn_names(self.config, layer, e) for e in range(self.num_experts)]
        return [Expert(self._read(gate), self._read(up), self._read(down), activation) for gate, up, down in names]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(input_ids, self._read("model.embed_tokens.weight"))

    def head(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight of the last norm, [hidden], and of the language model's head, [vocabulary, hidden]."""
        tied = self.config.tie_word_embeddings
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self._read("model.norm.weight"), self._read(name)

    def stored_dtype(self) -> torch.dtype:
        name = ffn_names(self.config, 0, 0)[2]
        with safe_open(self._shards[name], framework="pt") as tensors:
            return tensors.get_tensor(name).dtype

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._shards[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(self.device, torch.float32)


def ffn_output(x: torch.Tensor, routes: Routes, experts: Sequence[Expert]) -> torch.Tensor:
    """What a feed-forward block adds to the residual stream: [tokens, hidden] from inputs of that shape."""
    output = torch.zeros_like(x)
    for number, expert in enumerate(experts):
        token, weight = routes.of(number)
        if len(token):
            output.index_add_(0, token, expert.neurons(x[token]) @ expert.down.T * weight[:, None])
    return output


CHUNK_TOKENS = 8192
"""Tokens that are computed together."""


class Streams:
    """The residual streams before one layer, by name, [sequences, tokens, hidden] in fp32 each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npy"
        stream = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        with path.open("r+b") as file:
            # Now, when a full disk is an error; in the middle of the mapping it would be a crash.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return stream

    def open(self, name: str) -> NDArray[np.float32]:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def chunks(num_sequences: int, sequence_length: int) -> Iterator[slice]:
    step = max(1, CHUNK_TOKENS // sequence_length)
    return (slice(start, start + step) for start in range(0, num_sequences, step))


def tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A part of a stream as a tensor of its own."""
    return torch.from_numpy(np.array(array)).to(device)
