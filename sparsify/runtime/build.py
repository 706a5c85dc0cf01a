"""Loads the C++ kernels: compiled when they are first wanted, for the processor at hand, and kept; else the wheel's.

No headers of torch or Python are needed: the library takes addresses. What is compiled stands in ~/.cache/sparsify/kernels,
or in SPARSIFY_KERNEL_CACHE, under a name made of the sources, the compiler and the processor: nodes that share a home folder
never load each other's. A wheel that was built where there was a compiler brings libraries for kinds of processors.

The commands that turn the C++ sources into a library: at first use (build.py) and for a wheel (hatch_build.py).

hatch_build.py loads this file alone, so it imports nothing but the standard library.
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
from collections.abc import Sequence, Set
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-w")
OPENMP = ("-fopenmp",)
THIS_PROCESSOR = (("-march=native", *OPENMP), ("-mcpu=native", *OPENMP), OPENMP, ())
"""What is added, best first: not every compiler knows the processor's name or brings OpenMP."""

X86_LEVELS = {
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset(
        {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
        | {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
    ),
    "x86-64": frozenset(),
}
"""Levels of the x86-64 ABI that wheels have kernels for, best first, and what each adds to the next, in the words of
/proc/cpuinfo. Source: System V ABI, AMD64 supplement, table 3.1."""


def find_compiler() -> str | None:
    """Path of the C++ compiler: what CXX names, else the first that is installed."""
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else COMPILERS)), None)


def compile_kernels(
    compiler: str, to: Path, choices: Sequence[Sequence[str]] = THIS_PROCESSOR
) -> None:
    """Writes the library, with the first of `choices` that the compiler takes.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses all of them.
    """
    for last, choice in enumerate(choices, start=1 - len(choices)):
        command = [compiler, *FLAGS, *choice, str(SOURCES / "sparse_ffn.cpp"), "-o", str(to)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            return
        if last == 0:
            result.check_returncode()


def variants(machine: str) -> dict[str, Sequence[Sequence[str]]]:
    """The libraries of a wheel for a kind of machine (`platform.machine()`): name to choices of flags, best first."""
    if machine.lower() not in ("x86_64", "amd64"):
        return {machine.lower(): (OPENMP, ())}
    return {level: ((f"-march={level}", *OPENMP), (f"-march={level}",)) for level in X86_LEVELS}


def runnable_variants(machine: str, flags: Set[str]) -> list[str]:
    """Names of `variants` that a processor with these flags runs, best first; without flags the baseline alone."""
    names = list(variants(machine))
    needs = [X86_LEVELS.get(name, frozenset()) for name in names]
    return [name for i, name in enumerate(names) if frozenset().union(*needs[i:]) <= flags]


def library_name(variant: str) -> str:
    """File name of a variant in a wheel."""
    return f"sparse_ffn-{variant}.so"


PREBUILT = Path(__file__).parent / "prebuilt"
"""Only in wheels; hatch_build.py fills it."""

INSTEAD = "{reason} The kernels that came with the wheel are used instead."
WITHOUT = (
    "{reason} Sparse decoding goes on with torch's operators: the same values, but hardly faster than the dense model. "
    "For the kernels, install a C++ compiler (g++ or clang++, or name one in CXX), or a wheel of sparsify that was built "
    "where there is one."
)


class _Unavailable(Exception):
    """Says why there are no kernels from one source."""


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The kernels; None where they can neither be compiled nor came with the wheel, which is said once by a warning."""
    try:
        library = _compiled()
    except _Unavailable as not_compiled:
        try:
            library = _prebuilt()
        except _Unavailable as not_shipped:
            reason = f"{not_compiled} {not_shipped}"
            warnings.warn(WITHOUT.format(reason=reason), stacklevel=2)
            return None
        if find_compiler():
            warnings.warn(INSTEAD.format(reason=not_compiled), stacklevel=2)
    library.sparsify_start()
    library.sparsify_call_bytes.restype = ctypes.c_int64
    library.sparsify_read.restype = ctypes.c_double
    library.sparsify_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return library


def _compiled() -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise _Unavailable("There is no C++ compiler here.")
    try:
        return ctypes.CDLL(str(build(compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise _Unavailable(
            f"The kernels cannot be compiled with {compiler}: {said.strip()[-500:]}."
        ) from None


def _prebuilt() -> ctypes.CDLL:
    names = map(library_name, runnable_variants(platform.machine(), processor_flags()))
    library = next(filter(Path.is_file, (PREBUILT / name for name in names)), None)
    if library is None:
        raise _Unavailable("This installation brings no kernels for this processor.")
    try:
        # Its OpenMP is torch's, which is loaded by now: a machine without a compiler often has no other.
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise _Unavailable(
            f"The kernels that came with the wheel cannot be loaded: {error}."
        ) from None


def build(compiler: str) -> Path:
    """Returns the library, compiling it unless it stands in the cache.

    Raises:
        subprocess.CalledProcessError: If the compiler refuses under every choice of flags.
        OSError: If the cache cannot be written.
    """
    folder = cache_folder()
    library = folder / f"sparse_ffn-{_fingerprint(compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    print(
        f"sparsify: compiling the decoding kernels for this processor with {compiler}; about 15 seconds, once.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two processes may compile at once
        made = Path(scratch) / library.name
        compile_kernels(compiler, made)
        made.replace(library)
    return library


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    return Path(os.environ.get("SPARSIFY_KERNEL_CACHE", "~/.cache/sparsify/kernels")).expanduser()


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    digest.update(repr((version.stdout, FLAGS, THIS_PROCESSOR, _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """The name and the abilities of the processor, as far as the system tells."""
    told = {line for line in _cpuinfo() if line.startswith(("flags", "Features", "CPU part"))}
    return platform.machine() + ("".join(sorted(told)) or platform.processor())


def processor_flags() -> frozenset[str]:
    """What all cores can do, in Linux's words; empty where the system does not tell."""
    cores = [set(line.partition(":")[2].split()) for line in _cpuinfo() if line.startswith("flags")]
    return frozenset(set.intersection(*cores) if cores else ())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
