"""A checkpoint one layer at a time: only that layer's weights are in memory, in fp32, on the GPU where there is one.

The residual stream of the calibration sequences between two layers is on the disk. Only one layer's streams are kept: those of a
layer take the place of those before it when the layer is done, so that an interrupted calibration resumes with the current layer.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.layout import LAYER, mask_names, name_on_disk, projection_names, tensor_shapes
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.conversion.source_tensors import read_shapes
from sparsify.errors import ModelError
from sparsify.methods.layer_expert import Expert, Routes, turned
from sparsify.models import FfnActivation, SparseConfig, family_of
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.models.masking import (
    INPUTS,
    READERS,
    SiteMask,
    mask_tensors,
    num_experts,
)

LEAST_ROWS = 256
"""An expert that got fewer calibration tokens than this keeps its weights, and has no statistics of its own."""
CHUNK_TOKENS = 8192
"""Tokens that are computed together."""
ATTENTION_SITES = tuple(site for site in INPUTS if site.startswith("attn"))
"""The sites of the attention, in the order in which it computes them."""


def ffn_names(config: SparseConfig, layer: int, expert: int) -> tuple[str, str, str]:
    """Names on disk of one expert's gate, up and down projection."""
    gate, up, down = (projection_names(config, layer, name)[expert] for name in ("gate_proj", "up_proj", "down_proj"))
    return gate, up, down


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
    """A feed-forward block as a method rewrites it.

    Attributes:
        number: Of the layer.
        dtype: Dtype on disk: what is fitted is rounded to it before it is evaluated.
        inputs: Gives all calibration tokens, again on each call.
        measure: Whether errors are wanted that no decision needs.
    """

    dense: list[Expert]
    replaced: list[Expert]
    number: int
    dtype: torch.dtype
    inputs: InputsOf
    measure: bool = True


def as_stored(parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A mask's parts in fp32, rounded as they will be stored."""
    return {part: values.clamp(max=torch.finfo(dtype).max).to(dtype).float() for part, values in parts.items()}


class Attention:
    """A layer without its feed-forward block, and the router of that.

    It holds the layer twice: as it is, and with the masks that are fitted to it and the weights that these change.

    Args:
        config: Of the model.
        layer: Its number: layers may differ in what they attend to.
        mask: `config.sparsification` of the masks to fit; None to compute those that the model stores, if any.
        device: Where to compute.

    Attributes:
        masked: Whether masks that are fitted are computed.
        changed: Weights of projections that differ from the checkpoint's, by the projection's name.
    """

    def __init__(self, config: SparseConfig, layer: int, mask: dict[str, Any] | None, device: torch.device) -> None:
        self._family = family_of(config)
        self._stored = mask_tensors(config) if mask is None else {}
        own = config.sparsification if self._stored else None
        self._decoder, self._router = _without_block(config, layer, own, device)
        self._router_name = name_on_disk(config, f"{LAYER.format(0)}mlp.gate.weight").removeprefix(LAYER.format(0))
        self._masked = self._decoder if mask is None else _without_block(config, layer, mask, device)[0]
        self.masked = False
        self.changed: dict[str, torch.Tensor] = {}
        self._before_refit: dict[str, torch.Tensor] = {}

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Loads the weights of a layer, by their names inside it; those of feed-forward blocks are ignored. Masks that are to be
        fitted keep all.
        """
        for decoder in {self._decoder, self._masked}:
            for name, parameter in decoder.layers[0].named_parameters():
                parameter.data.copy_(tensors[name])
            if self._stored:
                for name, stored in decoder.layers[0].state_dict().items():
                    stored.copy_(tensors[name])
                continue
            for module in decoder.modules():
                if isinstance(module, SiteMask):
                    module.keep_all()
                for part in ("constant", "left", "right"):
                    if getattr(module, f"remainder_{part}", None) is not None:
                        getattr(module, f"remainder_{part}").zero_()
        if self._router is not None:
            self._router.float().weight.data.copy_(tensors[self._router_name])
        self.masked, self.changed, self._before_refit = False, {}, {}

    def fit(self, site: str, parts: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Applies a fitted mask: its parts, by the names of `site_parts`, and the rotation of the weights that read it."""
        self._mask(site).put({part: values for part, values in parts.items() if "." not in part})
        for name in READERS[site]:
            for part in (part for part in parts if part.startswith(f"{name}.")):
                setattr(self._projection(name), f"remainder_{part.partition('.')[2]}", parts[part])
            if "basis" in parts:
                self.change(name, turned(self.weight(name), parts["basis"]), dtype)

    @contextmanager
    def trying(self, masks: Mapping[str, Mapping[str, torch.Tensor]], dtype: torch.dtype) -> Iterator[None]:
        """Computes with these masks, parts by site, on top of those fitted so far, until the block ends."""
        buffers = [(module, dict(module._buffers)) for module in self._masked.modules()]
        changing = [name for site in masks if "basis" in masks[site] for name in READERS[site]]
        weights = {name: self.weight(name).clone() for name in changing}
        masked, changed = self.masked, self.changed
        self.masked, self.changed = True, dict(changed)
        try:
            for site, parts in masks.items():
                self.fit(site, parts, dtype)
            yield
        finally:
            self.masked, self.changed = masked, changed
            for name, weight in weights.items():
                self.weight(name).copy_(weight)
            for module, old in buffers:
                module._buffers.update(old)

    def weight(self, projection: str) -> torch.Tensor:
        """Of q_proj, k_proj, v_proj or o_proj as it is with the masks, [outputs, inputs]."""
        return self._projection(projection).weight.data

    def change(self, projection: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """Gives a projection another weight where masks are applied, rounded as it will be stored."""
        self.changed[projection] = weight.to(dtype).float()
        self.weight(projection).copy_(self.changed[projection])

    def refit(self, projection: str, weight: torch.Tensor, dtype: torch.dtype) -> None:
        """`change` for a reconstruction, which `use` can switch off."""
        self._before_refit[projection] = self.weight(projection).clone()
        self.change(projection, weight, dtype)

    def use(self, *, masks: bool, refits: bool) -> None:
        """Which of its masks and reconstructions are computed from here on."""
        self.masked = masks
        for name, old in self._before_refit.items():
            self.weight(name).copy_(self.changed[name] if refits else old)

    def constant(self, projection: str) -> torch.Tensor | float:
        """What is added to a projection's output in place of dropped inputs; 0 for nothing."""
        constant = getattr(self._projection(projection), "remainder_constant", None)
        return 0.0 if constant is None else constant

    def reads(
        self, projections: Sequence[str], hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """What projections read with all masks, their own included, [sequences, tokens, channels] each; arguments as of a call."""
        seen: dict[str, torch.Tensor] = {}

        def see(name: str, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0]

        linears = {name: self._projection(name) for name in projections}
        hooks = [linear.register_forward_pre_hook(partial(see, name)) for name, linear in linears.items()]
        masked, self.masked = self.masked, True
        try:
            self(hidden, position_ids)
        finally:
            for hook in hooks:
                hook.remove()
            self.masked = masked
        masks = {name: getattr(linear, "input_mask", None) for name, linear in linears.items()}
        return {name: seen[name] if mask is None else mask(seen[name]) for name, mask in masks.items()}

    def values(self, site: str, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The values of a site before its mask, [sequences, tokens, channels]; arguments as of a call."""
        hook = self._mask(site).register_forward_pre_hook(_stop)
        masked, self.masked = self.masked, True
        try:
            self(hidden, position_ids)
        except _Reached as reached:
            return reached.values
        finally:
            hook.remove()
            self.masked = masked
        raise AssertionError(f"the attention does not compute {site}")

    def __call__(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """The residual stream before the feed-forward block, [sequences, tokens, hidden], from that before the layer."""
        return self._decoded(self._masked if self.masked else self._decoder, hidden, position_ids)

    @staticmethod
    def _decoded(decoder: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return decoder(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state

    def ffn_inputs(self, residual: torch.Tensor) -> torch.Tensor:
        """What the feed-forward block sees, [sequences * tokens, hidden]."""
        norm = self._norm(self._family.ffn_norm)
        return (residual if norm is None else norm(residual)).flatten(0, -2)

    def behind_block(self, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The residual stream after the layer, from that before the block and the block's output, both [..., hidden]."""
        norm = self._norm(self._family.ffn_output_norm)
        return residual + (output if norm is None else norm(output))

    def block_gap(self, after: torch.Tensor, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """What to add to a block's output so that the stream becomes `after`: to first order where a norm is between them."""
        norm = self._norm(self._family.ffn_output_norm)
        return after - residual - output if norm is None else _before(norm, after - residual, output)

    def attention_gap(self, after: torch.Tensor, residual: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The same for what the output projection of the attention gives."""
        norm = self._norm(self._family.attention_output_norm)
        return after - residual - output if norm is None else _before(norm, after - residual, output)

    def attention_output(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """What the output projection gives without masks, [sequences, tokens, hidden]; arguments as of a call."""
        if self._family.attention_output_norm is None:
            return self._decoded(self._decoder, hidden, position_ids) - hidden
        seen: list[torch.Tensor] = []
        hook = self._decoder.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: seen.append(args[2]))
        try:
            self._decoded(self._decoder, hidden, position_ids)
        finally:
            hook.remove()
        return seen[0]

    def norms(self) -> dict[str, torch.Tensor]:
        """Weights of the norms in front of the attention and of the block, by their names, fp32 [hidden] each; those that there are."""
        names = [name for name in (self._family.attention_norm, self._family.ffn_norm) if name is not None]
        return {name: self._norm(name).weight.detach().clone() for name in names}

    def _norm(self, name: str | None) -> Any:
        return None if name is None else getattr(self._decoder.layers[0], name)

    def routes(self, x: torch.Tensor) -> Routes:
        if self._router is None:
            zeros = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
            return Routes(zeros, torch.ones_like(zeros, dtype=x.dtype))
        _, weights, experts = self._router(x)
        return Routes(experts, weights)

    def _projection(self, name: str) -> Any:
        return getattr(self._masked.layers[0].self_attn, name)

    def _mask(self, site: str) -> SiteMask:
        attention = self._masked.layers[0].self_attn
        return attention.input_mask if site == "attn_in" else self._projection(READERS[site][0]).input_mask


def _before(norm: Any, wanted: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What to add in front of an RMS norm, to first order, so that `wanted` comes out of it."""
    # It divides by one number for each token and multiplies by one for each channel: together output / norm(output).
    normed = norm(output)
    return torch.where(normed == 0, 0.0, (wanted - normed) * output / normed)


class _Reached(Exception):
    def __init__(self, values: torch.Tensor) -> None:
        super().__init__()
        self.values = values


def _stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    """A hook on a mask: what is computed behind it is not wanted."""
    raise _Reached(args[0])


def _without_block(
    config: SparseConfig, number: int, mask: dict[str, Any] | None, device: torch.device
) -> tuple[Any, Any]:
    """A decoder of one layer without a feed-forward block, norm and embedding, in fp32; and the block's router."""
    one_layer = _one_layer(config, number)
    one_layer.sparsification = mask
    with torch.device("meta"):
        decoder: Any = family_of(config).model(one_layer).model
    layer = decoder.layers[0]
    router = getattr(layer.mlp, "gate", None)
    layer.mlp, decoder.norm, decoder.embed_tokens = _Nothing(), nn.Identity(), nn.Identity()
    layer.to_empty(device=device)
    if router is not None:
        router.to_empty(device=device)
    # Without a feed-forward block it applies no activation: the model's own check of its experts has nothing to look at.
    decoder.config.ffn_activation, decoder.config.sparsification = STOCK_ACTIVATION, None
    decoder.rotary_emb = type(decoder.rotary_emb)(config=one_layer).to(device)
    return decoder.float().eval(), router


def _one_layer(config: SparseConfig, number: int) -> SparseConfig:
    """The configuration of a model of a single layer, that of this number."""
    own = deepcopy(config)
    own.num_hidden_layers = 1
    if (kinds := getattr(own, "layer_types", None)) is not None:
        own.layer_types = [kinds[number]]  # pyright: ignore[reportAttributeAccessIssue]
    return own


class _Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class LayerReader:
    """Reads a checkpoint's layers.

    Args:
        folder: The checkpoint.
        mask: `config.sparsification` of the masks to fit; None where the masks that the checkpoint stores, if any, apply.
        device: Where to compute.
    """

    def __init__(self, folder: Path, mask: dict[str, Any] | None, device: torch.device) -> None:
        checkpoint = read_checkpoint(folder)
        name = stored_activation(checkpoint.config)
        self.config = sparse_config(checkpoint.config, name, str(folder))
        if difference := family_of(self.config).layer_difference:
            raise ModelError(
                f"The model is a {self.config.model_type}, which has {difference}: a method that goes through layers does not know it.",
                next_step="Use the method on the dense model, or train this one as it is, without a calibration.",
            )
        self.device = device
        self._shards = {key: shard for shard in checkpoint.shards for key in read_shapes(shard)}
        self._mask = mask

    def stored_masks(self, layer: int) -> dict[str, dict[str, torch.Tensor]]:
        """Parts, by site, of the masks that the checkpoint stores; nothing where others are fitted."""
        names = mask_names(self.config, layer) if self._mask is None else {}
        return {site: {part: self._read(name) for part, name in parts.items()} for site, parts in names.items()}

    @property
    def num_experts(self) -> int:
        return num_experts(self.config)

    def attention(self, layer: int) -> Attention:
        """The layer without its feed-forward block."""
        prefix = f"model.layers.{layer}."
        wanted = [key for key in tensor_shapes(self.config) if key.startswith(prefix)]
        skipped = {name for e in range(self.num_experts) for name in ffn_names(self.config, layer, e)}
        kept = [key for key in wanted if key not in skipped]
        attention = Attention(self.config, layer, self._mask, self.device)
        attention.load({key.removeprefix(prefix): self._read(key) for key in kept})
        return attention

    def experts(self, layer: int, activation: FfnActivation) -> list[Expert]:
        names = [ffn_names(self.config, layer, e) for e in range(self.num_experts)]
        return [Expert(self._read(gate), self._read(up), self._read(down), activation) for gate, up, down in names]

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        scale = family_of(self.config).embedding_scale
        states = nn.functional.embedding(input_ids, self._read("model.embed_tokens.weight"))
        return states if scale is None else states * scale(self.config)

    def head(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Gives the logits, [tokens, vocabulary], of the residual stream after the last layer, [tokens, hidden]."""
        with torch.device("meta"):
            norm: Any = family_of(self.config).model(_one_layer(self.config, 0)).model.norm
        norm.weight = nn.Parameter(self._read("model.norm.weight"), requires_grad=False)
        tied = self.config.tie_word_embeddings
        weight = self._read("model.embed_tokens.weight" if tied else "lm_head.weight")
        cap = getattr(self.config, "final_logit_softcapping", None)

        def logits(state: torch.Tensor) -> torch.Tensor:
            values = norm(state) @ weight.T
            return values if cap is None else torch.tanh(values / cap) * cap

        return logits

    def stored_dtype(self) -> torch.dtype:
        name = ffn_names(self.config, 0, 0)[2]
        with safe_open(self._shards[name], framework="pt") as tensors:
            return tensors.get_tensor(name).dtype

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self._shards[name], framework="pt") as tensors:
            return tensors.get_tensor(name).to(self.device, torch.float32)


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
    return (slice(start, min(start + step, num_sequences)) for start in range(0, num_sequences, step))


def tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A part of a stream as a tensor of its own."""
    return torch.from_numpy(np.array(array)).to(device)
