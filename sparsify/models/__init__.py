"""Sparse models: a family is one file, `sparse_NAME.py`.

The files in this folder are the ones that train and the ones that an export ships: they import transformers, torch and each
other, and nothing else of this package. The table of activations needs neither torch nor transformers, so the classes are
imported when one of them is first used: recipes and help texts read the table alone.
"""

from typing import TYPE_CHECKING, Any

from sparsify.models.activations import ACTIVATIONS as ACTIVATIONS
from sparsify.models.activations import Activation as Activation

if TYPE_CHECKING:
    from sparsify.models.classes import *  # noqa: F403


def __getattr__(name: str) -> Any:
    import sparsify.models.classes as classes

    return getattr(classes, name)
