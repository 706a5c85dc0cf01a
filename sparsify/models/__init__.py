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
        MODEL_CLASSES,
        SITES,
        FfnActivation,
        SiteRule,
        SparseConfig,
        SparseMistralConfig,
        SparseMistralForCausalLM,
        SparseMixtralConfig,
        SparseMixtralForCausalLM,
        SparseModel,
        ThresholdMask,
        mask_tensors,
        site_rules,
    )

__all__ = [
    "ACTIVATIONS",
    "CONFIG_CLASSES",
    "MODEL_CLASSES",
    "SITES",
    "Activation",
    "FfnActivation",
    "SiteRule",
    "SparseConfig",
    "SparseMistralConfig",
    "SparseMistralForCausalLM",
    "SparseMixtralConfig",
    "SparseMixtralForCausalLM",
    "SparseModel",
    "ThresholdMask",
    "mask_tensors",
    "site_rules",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sparsify.models import classes

    return getattr(classes, name)
