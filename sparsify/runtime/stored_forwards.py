"""Forwards of feed-forward blocks whose neurons are in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsify.errors import ModelError
from sparsify.models.quantised import BlockMatrix
from sparsify.runtime.column_cache import ColumnCache
from sparsify.runtime.forwards import ExpertsForward, MlpForward
from sparsify.runtime.neuron_cache import NeuronCache
from sparsify.runtime.weights import FfnWeights, Matrix, Options

CHUNK_TOKENS = 512
"""Tokens of a prompt whose activations are in memory at once."""


class StoredForward:
    """What the forwards of blocks in a file have in common. Comes before BlockForward."""

    block: Any
    options: Options
    _cache: NeuronCache | ColumnCache
    first: int

    def _open(self, cache: NeuronCache | ColumnCache, first: int) -> None:
        self._cache, self.first = cache, first
        self.in_blocks_alone = self.options.blocks is not None
        if self.options.blocks is None:
            self._show_whole_block()

    def _show_whole_block(self) -> None:
        """Makes the block's parameters views of where its weights are read to."""
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.block.parameters()).dtype

    def prepare(self) -> None:
        pass

    def _matrices(self, index: int) -> Sequence[Matrix]:
        return self._cache.matrices(self.first + index, self._dtype)

    def _blocks(self, index: int) -> Sequence[BlockMatrix]:
        found = self._cache.whole_block(self.first + index, self._dtype)
        return [one for one in found if isinstance(one, BlockMatrix)]

    def weights(self, index: int, like: torch.Tensor) -> FfnWeights:
        made = super().weights(index, like)  # pyright: ignore[reportAttributeAccessIssue]
        return replace(made, store=self._cache.store(self.first + index))

    @contextmanager
    def _counting(self, index: int = 0, x: torch.Tensor | None = None) -> Iterator[None]:
        """Tells the cache which neurons fire in the block inside, which reads x [tokens, hidden], if it needs to know."""
        if not self._cache.wants_uses:
            yield
            return
        seen = 0

        def note(_module: Any, _given: Any, output: torch.Tensor) -> None:
            nonlocal seen
            fired = (output != 0).flatten(0, -2)
            read = None if x is None else x[seen : seen + len(fired)].to(torch.float16).numpy()
            seen += len(fired)
            self._cache.note_uses(self.first + index, fired.numpy(), read)

        hook = self.block.ffn_activation.register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def _read_whole(self, index: int = 0) -> None:
        self._cache.whole_block(self.first + index, self._dtype)

    def remove(self) -> None:
        raise ModelError(
            "The model's neurons are in a file, which only this forward reads.",
            next_step="Load the model again, without a limit on memory.",
        )


class StoredMlpForward(StoredForward, MlpForward):
    """Forward of a dense block whose neurons are in a file."""

    def __init__(self, block: Any, options: Options, cache: NeuronCache | ColumnCache, first: int) -> None:
        MlpForward.__init__(self, block, options)
        self._open(cache, first)

    def _show_whole_block(self) -> None:
        gate, up, down_t = self._cache.whole_views(self._dtype)
        assert isinstance(down_t, torch.Tensor)
        for name, view in (("gate", gate), ("up", up), ("down", down_t.mT)):
            assert isinstance(view, torch.Tensor)
            linear = getattr(self.block, f"{name}_proj")
            linear._parameters["weight"] = nn.Parameter(view, requires_grad=False)

    def _dense(self, *arguments: torch.Tensor) -> torch.Tensor:
        (x,) = arguments
        flat = x.reshape(-1, x.shape[-1])
        with self._counting(0, flat):
            if self.in_blocks_alone:
                return self._in_chunks(flat, self._from_blocks).view(x.shape)
            self._read_whole()
            if len(flat) <= CHUNK_TOKENS:
                return type(self.block).forward(self.block, x)
            return self._in_chunks(flat, lambda part: type(self.block).forward(self.block, part)).view(x.shape)

    def _in_chunks(self, flat: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        out = torch.empty_like(flat)
        for start in range(0, len(flat), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            out[chunk] = compute(flat[chunk])
        return out


class StoredExpertsForward(StoredForward, ExpertsForward):
    """Forward of fused experts whose neurons are in a file."""

    def __init__(self, block: Any, options: Options, cache: NeuronCache, first: int) -> None:
        ExpertsForward.__init__(self, block, options)
        self._open(cache, first)

    def _show_whole_block(self) -> None:
        block, cache = self.block, self._cache
        assert isinstance(cache, NeuronCache)
        experts, double, hidden = block.gate_up_proj.shape
        values = cache.memory[: 3 * cache.layout.neurons * cache.layout.row_bytes].view(self._dtype)
        gate_up = values.as_strided((experts, double, hidden), (0, hidden, 1))
        down = values.as_strided((experts, hidden, double // 2), (0, 1, hidden), double * hidden)
        for name, view in (("gate_up_proj", gate_up), ("down_proj", down)):
            block._parameters[name] = nn.Parameter(view, requires_grad=False)
        block._compute = self._compute

    def _compute(self, expert: int, x: torch.Tensor, *given: Any) -> torch.Tensor:
        """In place of the class's: reads the expert first."""
        self._read_whole(expert)
        with self._counting(expert):
            return type(self.block)._compute(self.block, expert, x, *given)

    def _products(self, seen: torch.Tensor, x: torch.Tensor, index: int = 0) -> torch.Tensor:
        with self._counting(index):
            return super()._products(seen, x, index)

    def _dense(self, *arguments: torch.Tensor) -> torch.Tensor:
        hidden_states, index, shares = arguments
        if self.in_blocks_alone:
            return self._from_blocks(hidden_states, index, shares)
        masked = self._masked(hidden_states)
        return type(self.block)._loop_over_experts(self.block, masked, index, shares, hidden_states)
