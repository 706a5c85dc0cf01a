"""How a model becomes sparse: one method, one paper, one file."""

from __future__ import annotations

import pkgutil
from importlib import import_module


def import_all() -> None:
    """Imports every module of this package, so that each method registers itself: no list names them."""
    for module in pkgutil.walk_packages(__path__, f"{__name__}."):
        import_module(module.name)
