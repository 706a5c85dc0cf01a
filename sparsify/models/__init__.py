"""Sparse Mistral and Sparse Mixtral.

The files in this folder are the ones that train and the ones that an export ships: they import transformers, torch and each
other, and nothing else of this package. The table of activations needs neither torch nor transformers, so the classes are
imported when one of them is first used: recipes and help texts read the table alone.
"""

from typing import TYPE_CHECKING, Any

from sparsify.models.activations import ACTIVATIONS, Activation

if TYPE_CHECKING:
    from sparsify.models.classes import (
        CONFIG_CLASSES,
        FFN_THRESHOLDS,
        MODEL_CLASSES,
        FfnActivation,
        SparseConfig,
        SparseMistralConfig,
        SparseMistralForCausalLM,
        SparseMixtralConfig,
        SparseMixtralForCausalLM,
        SparseModel,
    )

__all__ = [
    "ACTIVATIONS",
    "CONFIG_CLASSES",
    "FFN_THRESHOLDS",
    "MODEL_CLASSES",
    "Activation",
    "FfnActivation",
    "SparseConfig",
    "SparseMistralConfig",
    "SparseMistralForCausalLM",
    "SparseMixtralConfig",
    "SparseMixtralForCausalLM",
    "SparseModel",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsify.models import classes

    return getattr(classes, name)
