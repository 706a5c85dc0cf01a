"""Keys and values at one address, so that a captured step finds them, and transformers' caches as views of them.

The buffer holds one cache at a time. Another cache that comes to a step is copied into it, once; the one before gets copies of its
own then. So does whatever changed a layer between two steps (beam search, cropping, a prompt).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from sparsify.runtime.cache_store import SPARE_POSITIONS, Store, move_on, show

ALIGNED_POSITIONS = 64
MOST_ROOM = 4
"""Attention reads all of the buffer, so it has at most so many times the positions that a cache needs."""


class Room:
    """The buffer, and which cache it holds."""

    def __init__(self) -> None:
        self.store: Store | None = None
        self._holds: weakref.ref[Cache] | None = None

    @property
    def buffer(self) -> torch.Tensor:
        """[2 * layers, batch, kv_heads, capacity, head_dim]: keys of all layers, then values."""
        assert self.store is not None
        return self.store.buffer

    def take(self, cache: Cache, empty: torch.Tensor) -> Store:
        """Makes a cache's layers views of the buffer, with room for one more position; one that has none yet starts with `empty`
        [batch, kv_heads, 0, head_dim]. The buffer stays where it is, if it has room.
        """
        layers: list[Any] = cache.layers
        held = self._holds() if self._holds is not None else None
        if self.store is not None and held is cache and self.store.fits(layers):
            return self.store
        for layer in layers:
            if not layer.is_initialized:
                layer.lazy_initialization(empty, empty)
                layer.keys = layer.values = empty
        if held is not None and held is not cache:
            self._release(held)
        # Copies, since a layer may be a view of another part of the buffer.
        tensors = [one.clone() for one in (*(layer.keys for layer in layers), *(layer.values for layer in layers))]
        length = tensors[0].shape[2]
        needed = length + max(SPARE_POSITIONS, length // 2)
        if self.store is None or not self._has_room(tensors, length, needed):
            capacity = -(-needed // ALIGNED_POSITIONS) * ALIGNED_POSITIONS
            batch, heads, _, width = tensors[0].shape
            buffer = tensors[0].new_zeros(len(tensors), batch, heads, capacity, width)
        else:
            buffer = self.buffer
        for to, tensor in zip(buffer, tensors, strict=True):
            to[:, :, :length] = tensor
        buffer[:, :, :, length:] = 0  # what is masked is multiplied by 0, so it must be a number
        self.store, self._holds = Store(buffer, 0, length), weakref.ref(cache)
        show(self.store, layers)
        return self.store

    def advance(self, cache: Cache) -> None:
        """Takes the position that a step has written into the layers."""
        assert self.store is not None
        move_on(self.store, cache.layers)

    def _has_room(self, tensors: list[torch.Tensor], length: int, needed: int) -> bool:
        shape, like = self.buffer.shape, tensors[0]
        same = (shape[0], shape[1], shape[2], shape[4]) == (len(tensors), len(like), like.shape[1], like.shape[3])
        same &= self.buffer.dtype == like.dtype and self.buffer.device == like.device
        return same and length < shape[3] <= MOST_ROOM * max(needed, ALIGNED_POSITIONS)

    def _release(self, cache: Cache) -> None:
        """Gives a cache copies of what it has in the buffer."""
        assert self.store is not None
        layers: list[Any] = cache.layers
        for layer in layers:
            if vars(layer).get("store") is self.store:
                layer.keys, layer.values = layer.keys.clone(), layer.values.clone()


class StepCache(Cache):
    """What the model's own forward takes for a cache in a step: it writes one position of the buffer, and reads all."""

    def __init__(self, buffer: torch.Tensor, slot: torch.Tensor) -> None:
        half = len(buffer) // 2
        super().__init__(layers=[_StepLayer(*pair, slot) for pair in zip(buffer[:half], buffer[half:], strict=True)])


class _StepLayer(CacheLayerMixin):
    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slot: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.slot, self.is_initialized = keys, values, slot, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.keys is not None
        assert self.values is not None
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """The buffer is there already."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        assert self.keys is not None
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        """The mask and positions are given to the model, which therefore does not ask."""
        raise NotImplementedError

    def get_max_length(self) -> int:
        assert self.keys is not None
        return self.keys.shape[2]
