"""Compiles the C++ kernels when they are first wanted, for the processor at hand, and keeps the library.

No headers of torch or Python are needed: the library takes addresses. It stands in ~/.cache/sparsify/kernels, or in
SPARSIFY_KERNEL_CACHE, under a name made of the sources, the compiler and the processor: nodes that share a home folder
never load each other's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-w")
CHOICES = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-fopenmp",), ())
"""What is added, best first: not every compiler knows the processor's name or brings OpenMP."""

WITHOUT = (
    "{reason} Sparse decoding goes on with torch's operators: the same values, but hardly faster than the dense model. "
    "Install a C++ compiler (g++ or clang++, or name one in CXX) for the kernels."
)


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where there is no compiler, which is said once by a warning."""
    compiler = find_compiler()
    if compiler is None:
        warnings.warn(WITHOUT.format(reason="There is no C++ compiler here."), stacklevel=2)
        return None
    try:
        library = ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        reason = f"The kernels cannot be compiled with {compiler}: {said.strip()[-500:]}."
        warnings.warn(WITHOUT.format(reason=reason), stacklevel=2)
        return None
    library.sparsify_start()
    library.sparsify_call_bytes.restype = ctypes.c_int64
    library.sparsify_read.restype = ctypes.c_double
    library.sparsify_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return library


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, else the first that is installed."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else COMPILERS)), None)


def build(compiler: str, extra_flags: Sequence[str] = ()) -> Path:
    """Returns the library, compiling it unless it stands in the cache.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses under every choice of flags.
        OSError: If the cache cannot be written.
    """
    folder = cache_folder()
    library = folder / f"sparse_ffn-{_fingerprint(compiler, extra_flags)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"sparsify: compiling the decoding kernels for this processor with {compiler}; about 15 seconds, once.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two processes may compile at once
        made = Path(scratch) / library.name
        _compile(compiler, made, extra_flags)
        made.replace(library)
    return library


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("SPARSIFY_KERNEL_CACHE", "~/.cache/sparsify/kernels")).expanduser()


def _compile(compiler: str, to: Path, extra_flags: Sequence[str]) -> None:
    for last, choice in enumerate(CHOICES, start=1 - len(CHOICES)):
        command = [compiler, *FLAGS, *choice, *extra_flags]
        command += [str(SOURCES / "sparse_ffn.cpp"), "-o", str(to)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        if last == 0:
            result.check_returncode()


def _fingerprint(compiler: str, extra_flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    digest.update(repr((version.stdout, FLAGS, CHOICES, tuple(extra_flags), _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The name and the abilities of the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() + platform.machine()
    told = {line for line in lines if line.startswith(("flags", "Features", "CPU part"))}
    return platform.machine() + "".join(sorted(told))
