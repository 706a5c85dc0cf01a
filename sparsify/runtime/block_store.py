"""Where a block's rows are that memory does not hold, as the kernels read it."""

from __future__ import annotations

import ctypes

from sparsify.runtime.native_ffn import FfnCall
from sparsify.runtime.neuron_file import NeuronLayout

FETCH_FAILED = -2
"""As in native/neuron_store.h."""
FETCH = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)
"""Makes so many listed units of a block resident: 1, or it failed."""


class CStore(ctypes.Structure):
    """Where a block's rows are; mirrors NeuronStore in native/neuron_store.h."""

    _fields_ = (
        ("block", ctypes.c_int64),
        ("stream", ctypes.c_void_p),
        ("held", ctypes.c_void_p),
        ("num_held", ctypes.c_int64),
        ("num_rows", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("fetch", FETCH),
        ("failed", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("holds", ctypes.c_int32),
    )


SECOND_ROWS, ALL_ROWS, DOWN_ROWS, COLUMNS = range(4)
"""What lies in slots: `CStore.holds`."""


class BlockStore:
    """Tells the kernels where a block's rows are."""

    def __init__(self, store: CStore, layout: NeuronLayout) -> None:
        self._store, self._layout = store, layout

    def attach(self, call: FfnCall) -> None:
        """Before masks are known."""
        call.store = ctypes.addressof(self._store)
        for name in self._layout.in_unit:
            getattr(call, "down_t" if name == "down" else name).slots = self._store.slots

    def steer(self, call: FfnCall) -> None:
        """Once the masks of the block's inputs are known."""
