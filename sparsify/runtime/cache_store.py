"""Room behind the keys and values of a transformers cache, so that a step appends a position instead of copying all of them.

The cache stays transformers' own: its layers show views of one buffer for all that hold the same positions, which a step makes
longer by one position. Views are made when they are looked at: making those of all layers takes longer than all else that a step does
in Python. Whatever else changes a layer (beam search, cropping, a prompt) gives it other tensors; then the next step copies them once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

SPARE_POSITIONS = 256


@dataclass
class Store:
    """A buffer of layers that hold the same positions, of which they show a part.

    Attributes:
        buffer: [2 * layers, batch, kv_heads, capacity, head_dim]: keys of all layers, then values.
        first: Position of the buffer at which what the layers show begins.
        length: Positions that they show.
    """

    buffer: torch.Tensor
    first: int
    length: int
    _views: dict[int, torch.Tensor] = field(default_factory=dict)
    _views_of: tuple[int, int] | None = None
    _addresses: tuple[list[int], list[int]] | None = None
    _addresses_of: tuple[int, int] | None = None

    def view(self, row: int) -> torch.Tensor:
        """The part of a row of `buffer` that is shown; the same tensor until the part changes."""
        now = self.first, self.length
        if self._views_of != now:
            self._views, self._views_of = {}, now
        if row not in self._views:
            self._views[row] = self.buffer[row, :, :, self.first : self.first + self.length]
        return self._views[row]

    def __getstate__(self) -> dict[str, Any]:
        """Views of a copy are made of its own buffer."""
        return vars(self) | {"_views": {}}

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
        """Whether there is room for one more position, and all layers show this store."""
        room = self.first + self.length < self.buffer.shape[3]
        return room and all(vars(layer).get("store") is self for layer in layers)


def _shown(name: str) -> Any:
    """The property of a layer that shows a store: its keys or its values."""

    def get(layer: Any) -> torch.Tensor:
        store, index = layer.store, layer.index
        return store.view(index if name == "keys" else len(store.buffer) // 2 + index)

    def put(layer: Any, value: Any) -> None:
        hide(layer)
        setattr(layer, name, value)

    return property(get, put)


class ShownLayer(DynamicLayer):
    """A layer that shows its part of a `store`. It becomes a DynamicLayer again as soon as it is given other keys or values."""

    store: Store
    index: int
    keys, values = _shown("keys"), _shown("values")

    def get_seq_length(self) -> int:
        return self.store.length


class ShownSlidingLayer(DynamicSlidingWindowLayer):
    """The same for a DynamicSlidingWindowLayer."""

    store: Store
    index: int
    keys, values = _shown("keys"), _shown("values")


_SHOWN: dict[type, type] = {DynamicLayer: ShownLayer, DynamicSlidingWindowLayer: ShownSlidingLayer}
_OWN = {shown: own for own, shown in _SHOWN.items()}
KINDS = frozenset({*_SHOWN, StaticLayer})


def _own(layer: Any) -> type:
    """The class of a layer, or that which it has when it does not show a store."""
    return _OWN.get(type(layer), type(layer))


def hide(layer: Any) -> None:
    """Gives a layer that shows a store its own class back, with views of it as its keys and values."""
    keys, values = layer.keys, layer.values
    del layer.store, layer.index
    layer.__class__ = _own(layer)
    layer.keys, layer.values = keys, values


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
    kinds = {_own(layer) for layer in layers}
    mixed = len(layers) == sum(map(len, groups)) and [
        one for one in groups if len({*map(_own, _some(layers, one))}) > 1
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
        keys = layer.store.buffer[0] if type(layer) in _OWN else layer.keys
        if keys.device != like.device or keys.dtype != like.dtype or len(keys) != batch:
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
    store = vars(layers[0]).get("store")
    if store is None or not store.fits(layers):
        store = _store(layers, empty)
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
            move_on(layers[0].store, layers)


def move_on(store: Store, layers: list[Any]) -> None:
    """Shows a store's layers one position more, but those that a sliding window hides."""
    end = store.first + store.length + 1
    if isinstance(layers[0], DynamicSlidingWindowLayer):
        store.first = max(store.first, end - (layers[0].sliding_window - 1))
        for layer in layers:
            layer.cumulative_length += 1
    store.length = end - store.first


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
    store = Store(buffer, 0, length)
    show(store, layers)
    return store


def show(store: Store, layers: list[Any]) -> None:
    """Makes layers show a store instead of what they hold."""
    for index, layer in enumerate(layers):
        if type(layer) in _OWN:
            hide(layer)
        del layer.keys, layer.values
        layer.__class__ = _SHOWN[type(layer)]
        layer.store, layer.index = store, index
