"""Adds to Triton's interpreter what Liger's kernels need and it lacks; see `interpreter_environment` in tests/triton.py.

Python runs a module of this name when it starts, in a test's own processes as in those that `sparsify train` starts. Triton is
not imported here, but changed when something else imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


class _Scalar(float):
    """A scalar argument of a kernel, with the method that compiled Triton gives it."""

    def to(self, _: object) -> _Scalar:
        return self


def _add_scalars(interpreter: Any) -> None:
    converted = interpreter._implicit_cvt
    interpreter._implicit_cvt = lambda arg: _Scalar(arg) if type(arg) is float else converted(arg)


def _add_rsqrt(libdevice: Any) -> None:
    from triton import language

    # CUDA's function, of which the interpreter knows the name only: it returns None.
    libdevice.rsqrt = lambda x: language.math.rsqrt(x)


CHANGES = {
    "triton.runtime.interpreter": _add_scalars,
    "triton.language.extra.libdevice": _add_rsqrt,
}


class _Finder(MetaPathFinder):
    """Finds the modules of CHANGES where they are, and changes them after they are executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        change = CHANGES.get(fullname)
        spec = None if change is None else PathFinder.find_spec(fullname, path, target)
        if change is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, _Finder())
