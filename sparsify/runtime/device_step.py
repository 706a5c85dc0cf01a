"""One decoding step of a whole model on a GPU: the model's own forward over tensors that stay where they are, captured as a CUDA graph.

Feed-forward blocks and masked projections are our kernels, the others torch's operators; a graph starts all of them at once, without
Python. Without a GPU, in Triton's interpreter, a step computes the same without the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from sparsify.models.projection_masks import masked_product
from sparsify.runtime.columns import columns_first
from sparsify.runtime.device_cache import Room, StepCache
from sparsify.runtime.forwards import BlockForward
from sparsify.runtime.masks import bases_of, is_masked_linear, low_rank_of, num_bytes, own_mask
from sparsify.runtime.native_step import ATTENTION, Projections, projections, reaches
from sparsify.runtime.triton_columns import column_product, masked_by_triton
from sparsify.runtime.triton_ffn import COUNTS
from sparsify.runtime.weights import RowsRead

ATTENTION_KINDS = ("sdpa", "eager")
"""Implementations of attention that take the mask of a buffer of which only a part is filled."""


def device_refusal(model: Any, forwards: Sequence[BlockForward]) -> str | None:
    """Why the steps of a model cannot be computed over tensors that stay where they are."""
    kind = model.config._attn_implementation
    if kind not in ATTENTION_KINDS:
        return f"attention by {kind}"
    if len(reaches(model.config)) > 1:
        return "layers that attend to different lengths"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "a model on several devices"
    return next((unknown for one in forwards if (unknown := one.unknown_to_triton)), None)


class DeviceStep:
    """Steps of a model for one batch size after the other.

    Args:
        model: A sparse model on a GPU, or on a CPU if Triton interprets its kernels.
        forwards: The forward of each layer's block; empty for a model whose blocks are torch's.
        given: Which projections of the attention are held by columns.
    """

    def __init__(self, model: Any, forwards: Sequence[BlockForward], given: Projections) -> None:
        self.model, self.forwards, self.given = model, list(forwards), given
        self.room = Room()
        self.steps = self.tokens = 0
        self.captured = False  # whether the current graph exists
        self._graph: torch.cuda.CUDAGraph | None = None
        self._buffer: torch.Tensor | None = None
        like = model.model.embed_tokens.weight
        self._counts = torch.zeros(
            len(model.model.layers), len(COUNTS) + len(ATTENTION), dtype=torch.int64, device=like.device
        )
        # Reorders the memory of weights, where it must be, before anything takes their addresses.
        for name, linear in projections(model).items():
            given.matrix(name, linear)
        for forward in self.forwards:
            forward.weights(0, like)

    def run(
        self, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None, positions: torch.Tensor | None
    ) -> torch.Tensor:
        """One step.

        Args:
            ids: Token of each sequence, [batch, 1].
            cache: A `DynamicCache`, which gets one position more.
            mask: [batch, positions so far + 1], not 0 where a position is visible; None if all are.
            positions: Of each sequence, [batch or 1, 1]; None for the number of positions so far.

        Returns:
            Logits, [batch, vocabulary].

        Raises:
            RuntimeError: If the model cannot be captured. Nothing is lost: the cache is as it was.
        """
        # What stays must not be made in inference mode: outside of it, it could not be changed.
        with torch.inference_mode(False), torch.no_grad():
            attention, config = self.model.model.layers[0].self_attn, self.model.config
            like = self.model.model.embed_tokens.weight
            store = self.room.take(
                cache, like.new_empty(len(ids), config.num_key_value_heads, 0, attention.head_dim, requires_grad=False)
            )
            if self._buffer is not self.room.buffer:
                self._allocate(len(ids))
            cached, slot = int(cache.get_seq_length()), store.first + store.length
            self._ids.copy_(ids)
            self._slot.fill_(slot)
            self._positions.fill_(cached) if positions is None else self._positions.copy_(positions)
            if mask is None:
                self._shown.fill_(True)
            else:
                self._shown[:, store.first : slot + 1].copy_(mask[:, cached - store.length : cached + 1])
            if self._graph is not None:
                self._graph.replay()
            elif like.is_cuda:
                self._graph = self._capture(like.device)
                self.captured = True
                self._graph.replay()
            else:
                self._logits = self.compute()
            self.room.advance(cache)
            self.steps += 1
            self.tokens += len(ids)
            return self._logits.clone()

    def _allocate(self, batch: int) -> None:
        """The tensors of a batch that stay where they are. What was captured before reads others."""
        buffer = self.room.buffer
        self._graph, self._buffer, self.captured = None, buffer, False
        self._ids = torch.zeros(batch, 1, dtype=torch.int64, device=buffer.device)
        self._positions, self._slot = torch.zeros_like(self._ids), torch.zeros_like(self._ids[0])
        self._shown = torch.ones(batch, buffer.shape[3], dtype=torch.bool, device=buffer.device)
        self._cache = StepCache(buffer, self._slot)
        self._places = torch.arange(buffer.shape[3], device=buffer.device)

    def compute(self) -> torch.Tensor:
        """The step that is captured: only work on the device. Twice the same, it changes nothing but the counts. [batch, vocabulary]"""
        config = self.model.config
        window = reaches(config)[0].positions
        visible = self._shown & (self._places <= self._slot)
        if window is not None:
            visible &= self._places > self._slot - window
        mask = visible[:, None, None]
        dtype = self.room.buffer.dtype
        if config._attn_implementation == "eager":
            mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
        with torch.no_grad(), self._kernels():
            output = type(self.model).forward(
                self.model,
                input_ids=self._ids,
                attention_mask=mask,
                position_ids=self._positions,
                past_key_values=self._cache,
                use_cache=True,
            )
        return output.logits[:, -1]

    def _capture(self, device: torch.device) -> torch.cuda.CUDAGraph:
        counts = self._counts.clone()
        try:
            with torch.cuda.device(device):
                # The first time compiles kernels and makes room for products, which a capture cannot.
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.compute()
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._logits = self.compute()
                return graph
        finally:
            self._counts.copy_(counts)

    @contextmanager
    def _kernels(self) -> Iterator[None]:
        """Gives masks and masked projections of the attention, and the counts of blocks, what a captured step needs."""
        with ExitStack() as stack:
            for module in self.model.modules():
                if type(module).__name__ == "SiteMask":
                    stack.enter_context(_replaced(module, partial(_masked, module)))
            for index, layer in enumerate(self.model.model.layers):
                counts = self._counts[index, len(COUNTS) :]
                for place, name in enumerate(ATTENTION):
                    if self.given.by_columns(name):
                        linear = getattr(layer.self_attn, f"{name}_proj")
                        stack.enter_context(_replaced(linear, partial(_columns, linear, counts, place)))
            for forward, counts in zip(self.forwards, self._counts[:, : len(COUNTS)], strict=False):
                forward.counts = counts
                stack.callback(setattr, forward, "counts", None)
            yield

    def hand_over(self) -> None:
        """Moves what was counted to the forwards of the blocks. This waits for the device."""
        if not self.steps:
            return
        like = self.model.model.norm.weight
        for layer, forward, counts in zip(self.model.model.layers, self.forwards, self._counts.tolist(), strict=False):
            offered, gate, up, down, *columns = counts[: len(COUNTS)]
            forward.count_step(self.tokens, RowsRead(gate, up, down, offered, *columns), forward.weights(0, like))
            linears = {name: getattr(layer.self_attn, f"{name}_proj") for name in ATTENTION}
            offered_bytes = self.steps * sum(one.weight.nbytes for one in linears.values())
            masks = (own_mask(one) for one in (layer.self_attn, *linears.values()))
            read = self.steps * num_bytes(bases_of(*masks))
            for (name, linear), lines in zip(linears.items(), counts[len(COUNTS) :], strict=True):
                column = linear.weight.nbytes // linear.in_features
                read += lines * column if self.given.by_columns(name) else self.steps * linear.weight.nbytes
                read += self.steps * num_bytes(low_rank_of(linear))
            forward.count_rotations(self.steps)
            forward.count_attention(self.steps, read, offered_bytes)
        self._counts.zero_()
        self.steps = self.tokens = 0


def _masked(mask: nn.Module, x: torch.Tensor, experts: Any = None) -> torch.Tensor:
    # Rows of single experts are computed by torch, which asks the host which they are.
    return masked_by_triton(mask, x) if experts is None else type(mask).forward(mask, x, experts)


def _columns(linear: nn.Linear, counts: torch.Tensor, place: int, x: torch.Tensor) -> torch.Tensor:
    def multiply(masked: torch.Tensor) -> torch.Tensor:
        out = column_product(masked, columns_first(linear.weight), counts, place)
        return out if linear.bias is None else out + linear.bias

    return masked_product(linear, x, multiply) if is_masked_linear(linear) else multiply(x)


@contextmanager
def _replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
