"""Compiled kernels, once for all tests of a session and of the next: the cache is the user's own."""

from __future__ import annotations

import pytest

from sparsify.runtime.build import find_compiler, kernels


@pytest.fixture(scope="session")
def native() -> str:
    """The backend name of the compiled kernels."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    assert kernels() is not None
    return "native"
