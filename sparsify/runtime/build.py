"""Compiles and loads the C++ kernels: for this processor at their first use, otherwise from the wheel.

No headers of torch or Python are needed: the library takes addresses. Compiled libraries are in ~/.cache/sparsify/kernels or
SPARSIFY_KERNEL_CACHE, a folder that only its owner can use. Their name is a hash of sources, compiler, flags and processor, so that
nodes with a shared home folder never load each other's, and a hash of their own content. A wheel that was built with a compiler
contains libraries for several kinds of processors.

hatch_build.py loads this file alone, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-w")
UNITS = {
    "kernels": ("kernels.cpp",),
    "f32": ("format.cpp", "-DSPARSIFY_FORMAT=F32"),
    "bf16": ("format.cpp", "-DSPARSIFY_FORMAT=Bf16"),
    "f16": ("format.cpp", "-DSPARSIFY_FORMAT=F16"),
    "int8": ("format.cpp", "-DSPARSIFY_FORMAT=Int8Blocks"),
    "int4": ("format.cpp", "-DSPARSIFY_FORMAT=Int4Blocks"),
    "packed_bf16": ("format.cpp", "-DSPARSIFY_FORMAT=PackedBf16"),
    "packed_int8": ("format.cpp", "-DSPARSIFY_FORMAT=PackedInt8"),
    "packed_int4": ("format.cpp", "-DSPARSIFY_FORMAT=PackedInt4"),
}
"""What is compiled, each on a core of its own: the source file and its flags."""
OPENMP = ("-fopenmp",)
THIS_PROCESSOR = (("-march=native", *OPENMP), ("-mcpu=native", *OPENMP), OPENMP, ())
"""Extra flags, best first: not every compiler knows the processor's name or has OpenMP."""

VNNI = "x86-64-v4-vnni"
X86_LEVELS = {
    VNNI: frozenset({"avx512_vnni"}),
    "x86-64-v4": frozenset({"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}),
    "x86-64-v3": frozenset(
        {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
        | {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
    ),
    "x86-64": frozenset(),
}
"""x86-64 ABI levels that wheels have kernels for, best first, and the flags each adds to the next, as named in
/proc/cpuinfo. Source: System V ABI, AMD64 supplement, table 3.1. The first is ours: the fourth with AVX-512 VNNI, which multiplies
int8 and int4 weights as whole numbers of 512 bits."""


def find_compiler() -> str | None:
    """Path of the C++ compiler: CXX if set, otherwise the first that is installed."""
    requested = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [requested] if requested else COMPILERS)), None)


def compile_kernels(compiler: str, to: Path, choices: Sequence[Sequence[str]] = THIS_PROCESSOR) -> None:
    """Compiles the library with the first of `choices` that the compiler accepts, on all cores. Writes only next to `to`.

    Raises:
        subprocess.CalledProcessError: If it accepts none of them.
    """
    for last, choice in enumerate(choices, start=1 - len(choices)):
        try:
            return _compile(compiler, to, choice)
        except subprocess.CalledProcessError:
            if last == 0:
                raise


def _compile(compiler: str, to: Path, choice: Sequence[str]) -> None:
    def run(*arguments: str) -> None:
        subprocess.run([compiler, *FLAGS, *choice, *arguments], capture_output=True, text=True, check=True)

    def compile_unit(name: str) -> str:
        source, *flags = UNITS[name]
        part = f"{to}.{name}.o"
        run(*flags, "-c", str(SOURCES / source), "-o", part)
        return part

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = list(pool.map(compile_unit, UNITS))
    run("-shared", *parts, "-o", str(to))


def variants(machine: str) -> dict[str, Sequence[Sequence[str]]]:
    """The libraries of a wheel for a kind of machine (`platform.machine()`): names and their choices of flags, best first."""
    if machine.lower() not in ("x86_64", "amd64"):
        return {machine.lower(): (OPENMP, ())}
    flags = {level: (f"-march={level}",) for level in X86_LEVELS} | {VNNI: ("-march=x86-64-v4", "-mavx512vnni")}
    return {level: ((*own, *OPENMP), own) for level, own in flags.items()}


def runnable_variants(machine: str, flags: Set[str]) -> list[str]:
    """Names of `variants` that a processor with these flags can run, best first; only the baseline without flags."""
    names = list(variants(machine))
    needs = [X86_LEVELS.get(name, frozenset()) for name in names]
    return [name for i, name in enumerate(names) if frozenset().union(*needs[i:]) <= flags]


def library_name(variant: str) -> str:
    return f"kernels-{variant}.so"


PREBUILT = Path(__file__).parent / "prebuilt"
"""Exists only in wheels; written by hatch_build.py."""

INSTEAD = "{reason} The kernels that came with the wheel are used instead."
WITHOUT = (
    "{reason} Sparse decoding continues with torch's operators: the same values, but hardly faster than the dense model. "
    "For the kernels, install a C++ compiler (g++ or clang++, or name one in CXX), or a wheel of sparsify that was built "
    "where there is one."
)


class _Unavailable(Exception):
    """Reason why one source has no kernels."""


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """The kernels; None, with one warning, if they can neither be compiled nor loaded from the wheel."""
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
    for name in ("sparsify_call_bytes", "sparsify_step_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("sparsify_reader_open", "sparsify_stream_open"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("sparsify_reader_submit", "sparsify_stream_bytes"):
        getattr(library, name).restype = ctypes.c_int64
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
        raise _Unavailable(f"The kernels cannot be compiled with {compiler}: {said.strip()[-500:]}.") from None


def _prebuilt() -> ctypes.CDLL:
    names = map(library_name, runnable_variants(platform.machine(), processor_flags()))
    library = next(filter(Path.is_file, (PREBUILT / name for name in names)), None)
    if library is None:
        raise _Unavailable("This installation has no kernels for this processor.")
    try:
        # It uses torch's OpenMP, which is already loaded: a machine without a compiler often has no other.
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise _Unavailable(f"The kernels that came with the wheel cannot be loaded: {error}.") from None


def build(compiler: str) -> Path:
    """Returns the path of the library, compiling it unless it is in the cache.

    Raises:
        subprocess.CalledProcessError: If the compiler fails with every choice of flags.
        OSError: If the cache cannot be written, or somebody else can write to it.
    """
    folder = _own_folder(cache_folder())
    name = f"kernels-{_fingerprint(compiler)}"
    for library in folder.glob(f"{name}-*.so"):
        if _is_whole(library):
            return library
    print(
        f"sparsify: compiling the decoding kernels for this processor with {compiler}; up to half a minute, once.",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # two processes may compile at once
        compiled = Path(scratch) / f"{name}.so"
        compile_kernels(compiler, compiled)
        library = folder / f"{name}-{hashlib.sha256(compiled.read_bytes()).hexdigest()}.so"
        compiled.chmod(0o700)
        compiled.replace(library)
    return library


def _own_folder(folder: Path) -> Path:
    """Makes the cache folder, or takes one that nobody but this user can have written to: what is in it is executed.

    Raises:
        OSError: If it is a link, belongs to somebody else, or others may write to it or replace it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise OSError(f"the cache {folder} is a link or a file")
    if found.st_uid != os.getuid():
        raise OSError(f"the cache {folder} belongs to another user")
    if found.st_mode & 0o022:
        raise OSError(f"others may write to the cache {folder}; remove it, or name another by SPARSIFY_KERNEL_CACHE")
    for parent in folder.resolve().parents:
        mode = parent.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise OSError(f"others may replace the cache {folder}, since they may write to {parent}")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _is_whole(library: Path) -> bool:
    """Whether a file of the cache is this user's own, and has the content that its name says."""
    try:
        with os.fdopen(os.open(library, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
            return own and hashlib.sha256(file.read()).hexdigest() == library.stem.rpartition("-")[2]
    except OSError:
        return False


def cache_folder() -> Path:
    return Path(os.environ.get("SPARSIFY_KERNEL_CACHE", "~/.cache/sparsify/kernels")).expanduser()


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    digest.update(repr((version.stdout, FLAGS, UNITS, THIS_PROCESSOR, _processor())).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """Name and features of the processor, as far as the system reports them."""
    features = {line for line in _cpuinfo() if line.startswith(("flags", "Features", "CPU part"))}
    return platform.machine() + ("".join(sorted(features)) or platform.processor())


def processor_flags() -> frozenset[str]:
    """CPU flags common to all cores, as in /proc/cpuinfo; empty if not reported."""
    cores = [set(line.partition(":")[2].split()) for line in _cpuinfo() if line.startswith("flags")]
    return frozenset(set.intersection(*cores) if cores else ())


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
