"""Turns dense language models into activation-sparse ones: convert, continue pretraining, measure, export, decode.

import sparsify

loaded = sparsify.load("my-sparse-model")  # a model folder, a Hub id or a run folder
sparsify.accelerate(loaded.model)  # decoding skips the neurons whose activation is zero
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsify.runs.load import load
    from sparsify.runtime.accelerate import accelerate

__version__ = "0.1.0"
__all__ = ["__version__", "accelerate", "load"]


def __getattr__(name: str) -> Any:
    # Imported at first use: torch takes seconds, and `sparsify --help` needs none of it.
    if name == "load":
        from sparsify.runs.load import load

        return load
    if name == "accelerate":
        from sparsify.runtime.accelerate import accelerate

        return accelerate
    raise AttributeError(f"module 'sparsify' has no attribute '{name}'")
