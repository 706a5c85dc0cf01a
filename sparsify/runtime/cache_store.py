"""Room behind the keys and values of a transformers cache, so that a step appends a position instead of copying all of them.

The cache stays transformers' own: its layers hold views of one buffer for all that hold the same positions, which a step makes
longer by one position.
Whatever else changes a layer (beam search, cropping, a prompt) gives it other tensors; then the next step copies them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

SPARE_POSITIONS = 256
_STORE = "_sparsify_store"
KINDS = frozenset({DynamicLayer, DynamicSlidingWindowLayer, StaticLayer})


@dataclass
class Store:
    """A buffer of layers that hold the same positions, and the views of it that the layers hold.

    Attributes:
        buffer: [2 * layers, batch, kv_heads, capacity, head_dim]: keys of all layers, then values.
        first: Position of the buffer at which the layers' views begin.
        length: Positions of the views.
        views: The views, in the order of `buffer`.
    """

    buffer: torch.Tensor
    first: int
    length: int
    views: list[torch.Tensor]
    _addresses: tuple[list[int], list[int]] | None = None
    _addresses_of: tuple[int, int] | None = None

    def addresses(self) -> tuple[list[int], list[int]]:
        """Of each layer's keys and values at `first`; the same lists until they change."""
        buffer, half = self.buffer, len(self.buffer) // 2
        now = buffer.data_ptr(), self.first  # a copy of the cache has another buffer
        if self._addresses is None or self._addresses_of != now:
            start = now[0] + self.first * buffer.stride(3) * buffer.itemsize
            step = buffer.stride(0) * buffer.itemsize
            every = [start + index * step for index in range(2 * half)]
            self._addresses, self._addresses_of = (every[:half], every[half:]), now
        return self._addresses

    def fits(self, layers: list[Any]) -> bool:
        half = len(layers)
        return self.first + self.length < self.buffer.shape[3] and all(
            layer.keys is key and layer.values is value
            for layer, key, value in zip(layers, self.views[:half], self.views[half:], strict=True)
        )


@dataclass(frozen=True)
class Place:
    """Where a step reads and writes keys and values of layers that hold the same positions.

    Attributes:
        keys: Address of each layer's cache of keys, [batch, kv_heads, positions, head_dim].
        values: The same for values.
        cached: Positions that the caches hold; the new ones are written behind them.
        strides: Elements from one sequence, and from one head, to the next.
    """

    keys: list[int]
    values: list[int]
    cached: int
    strides: tuple[int, int]


def refusal(cache: Any, batch: int, like: torch.Tensor, groups: Sequence[Sequence[int]]) -> str | None:
    """Why a step cannot append to a cache of the dtype and device of `like`, None if it can. A cache that has no layers yet is refused
    without a reason: "". Layers of a group hold the same positions.
    """
    if not isinstance(cache, Cache):
        return "a cache that is not transformers' own"
    layers: list[Any] = cache.layers
    if not layers:
        return ""
    kinds = {type(layer) for layer in layers}
    mixed = len(layers) == sum(map(len, groups)) and [
        one for one in groups if len({*map(type, _some(layers, one))}) > 1
    ]
    if mixed or len(layers) != sum(map(len, groups)) or not kinds <= KINDS:
        return f"a cache of {', '.join(sorted(kind.__name__ for kind in kinds))}"
    if getattr(cache, "offloading", False):
        return "an offloaded cache"
    first = layers[0]
    if not first.is_initialized:
        return "" if isinstance(first, StaticLayer) else None
    if getattr(first, "record_past", False):
        return "a sliding window whose past is recorded"
    for layer in (first, layers[-1]):
        if layer.keys.device != like.device or layer.keys.dtype != like.dtype or len(layer.keys) != batch:
            return "a cache of another device, dtype or batch size"
    if isinstance(first, StaticLayer) and int(first.cumulative_length) >= first.max_cache_len:
        return "a static cache that is full"
    return None


def positions(cache: Cache) -> int:
    """Number of tokens that a cache has seen."""
    return int(cache.get_seq_length())


def place(cache: Cache, group: Sequence[int], empty: Callable[[], torch.Tensor]) -> Place:
    """Makes room for one more position in the layers of a group; one that has none yet starts with `empty` [batch, kv_heads, 0, head_dim]."""
    layers = _some(cache.layers, group)
    if isinstance(layers[0], StaticLayer):
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        return Place(
            [one.data_ptr() for one in keys],
            [one.data_ptr() for one in values],
            int(layers[0].cumulative_length),
            (keys[0].stride(0), keys[0].stride(1)),
        )
    stores = vars(cache).setdefault(_STORE, {})
    store = stores.get(group[0])
    if store is None or not store.fits(layers):
        store = stores[group[0]] = _store(layers, empty)
    buffer = store.buffer
    own_keys, own_values = store.addresses()
    return Place(own_keys, own_values, store.length, (buffer.stride(1), buffer.stride(2)))


def advance(cache: Cache, groups: Sequence[Sequence[int]]) -> None:
    """Takes the position that a step has written into the layers."""
    for group in groups:
        layers = _some(cache.layers, group)
        if isinstance(layers[0], StaticLayer):
            for layer in layers:
                layer.cumulative_length.add_(1)
        else:
            move_on(vars(cache)[_STORE][group[0]], layers)


def move_on(store: Store, layers: list[Any]) -> None:
    """Shows a store's layers one position more, but those that a sliding window hides."""
    end = store.first + store.length + 1
    if isinstance(layers[0], DynamicSlidingWindowLayer):
        store.first = max(store.first, end - (layers[0].sliding_window - 1))
        for layer in layers:
            layer.cumulative_length += 1
    store.length = end - store.first
    show(store, layers)


def _some(layers: Sequence[Any], group: Sequence[int]) -> list[Any]:
    return [layers[index] for index in group]


def _store(layers: list[Any], empty: Callable[[], torch.Tensor]) -> Store:
    for layer in layers:
        if not layer.is_initialized:
            first = empty()
            layer.lazy_initialization(first, first)
            layer.keys = layer.values = first
    keys = layers[0].keys
    batch, heads, length, width = keys.shape
    capacity = length + max(SPARE_POSITIONS, length // 2)
    buffer = keys.new_empty(2 * len(layers), batch, heads, capacity, width)
    tensors = [layer.keys for layer in layers] + [layer.values for layer in layers]
    for to, tensor in zip(buffer, tensors, strict=True):
        to[:, :, :length] = tensor
    store = Store(buffer, 0, length, [])
    show(store, layers)
    return store


def show(store: Store, layers: list[Any]) -> None:
    """Makes the layers' keys and values views of a store."""
    store.views = list(store.buffer[:, :, :, store.first : store.first + store.length].unbind(0))
    half = len(layers)
    for layer, key, value in zip(layers, store.views[:half], store.views[half:], strict=True):
        layer.keys, layer.values = key, value
