"""Compiles and loads the C++ kernels, library by library: for this processor at their first use, otherwise from the wheel.

No headers of torch or Python are needed: the library takes addresses. Compiled libraries are in ~/.cache/sparsify/kernels or
SPARSIFY_KERNEL_CACHE, a folder that only its owner can use. Their name is a hash of sources, compiler, flags and processor, so that
nodes with a shared home folder never load each other's, and a hash of their own content. A wheel that was built with a compiler
contains libraries for several kinds of processors.

hatch_build.py loads this file alone, so it imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import fcntl
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
from collections.abc import Collection, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-pthread", "-w")
FORMATS = {
    "f32": "F32",
    "bf16": "Bf16",
    "f16": "F16",
    "int8": "Int8Blocks",
    "int4": "Int4Blocks",
    "packed_bf16": "PackedBf16",
    "packed_int8": "PackedInt8",
    "packed_int4": "PackedInt4",
}
"""Formats of weights, in the order of their numbers, and their names in native/formats.h."""
READS = {"packed_bf16": "bf16", "packed_int8": "int8", "packed_int4": "int8"}
"""What packed rows are unpacked into: those formats call functions of these."""
LIBRARIES = {
    "kernels": ("kernels.cpp",),
    "integers": ("integer.cpp",),
    **{
        name: ("format.cpp", f"-DSPARSIFY_FORMAT={own}", f"-DSPARSIFY_NUMBER={number}")
        for number, (name, own) in enumerate(FORMATS.items())
    },
}
"""What is compiled, each when it is needed first: the source file and its flags."""
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


def compile_kernels(
    compiler: str, to: Path, choices: Sequence[Sequence[str]] = THIS_PROCESSOR, library: str = "kernels"
) -> None:
    """Compiles one of LIBRARIES with the first of `choices` that the compiler accepts. Writes only `to`.

    Raises:
        subprocess.CalledProcessError: If it accepts none of them.
    """
    source, *flags = LIBRARIES[library]
    for last, choice in enumerate(choices, start=1 - len(choices)):
        command = [compiler, *FLAGS, *choice, *flags, "-shared", str(SOURCES / source), "-o", str(to)]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True)
            return
        except subprocess.CalledProcessError:
            if last == 0:
                raise


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


def library_name(variant: str, library: str = "kernels") -> str:
    """File of one of LIBRARIES in a wheel."""
    return f"{library}-{variant}.so"


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
    """The decoding kernels; None, with one warning, if they can neither be compiled nor loaded from the wheel."""
    library = load("kernels")
    if library is None:
        return None
    for name in ("sparsify_call_bytes", "sparsify_step_bytes", "sparsify_layout"):
        getattr(library, name).restype = ctypes.c_int64
    for name in ("sparsify_formats", "sparsify_reader_open", "sparsify_stream_open"):
        getattr(library, name).restype = ctypes.c_void_p
    for name in ("sparsify_reader_submit", "sparsify_stream_bytes"):
        getattr(library, name).restype = ctypes.c_int64
    library.sparsify_read.restype = ctypes.c_double
    library.sparsify_read.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int)
    return library


_joined: set[str] = set()


def load_formats(names: Collection[str]) -> bool:
    """Makes the kernels read weights of these FORMATS. What is not compiled yet is compiled together, on all cores.

    Returns:
        Whether they do; False after a warning of the reason.
    """
    wanted = {part for name in names for part in (name, READS.get(name, name))}
    if wanted <= _joined:
        return True
    new = sorted(wanted - _joined)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        libraries = dict(zip(["kernels", *new], pool.map(load, ["kernels", *new]), strict=True))
    main = kernels()
    for name in new:
        library = libraries[name]
        if main is not None and library is not None:
            table, layout = ctypes.c_void_p(main.sparsify_formats()), ctypes.c_int64(main.sparsify_layout())
            if library.sparsify_join(table, layout):
                _joined.add(name)
    return wanted <= _joined


@functools.cache
def load(library: str) -> ctypes.CDLL | None:
    """One of LIBRARIES; None, with one warning, if it can neither be compiled nor loaded from the wheel."""
    try:
        loaded = _compiled(library)
    except _Unavailable as not_compiled:
        try:
            loaded = _prebuilt(library)
        except _Unavailable as not_shipped:
            reason = f"{not_compiled} {not_shipped}"
            _warn_once(WITHOUT.format(reason=reason))
            return None
        if find_compiler():
            _warn_once(INSTEAD.format(reason=not_compiled))
    loaded.sparsify_start()
    return loaded


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, stacklevel=3)


def _compiled(library: str) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        raise _Unavailable("There is no C++ compiler here.")
    try:
        return ctypes.CDLL(str(build(compiler, library)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise _Unavailable(f"The kernels cannot be compiled with {compiler}: {said.strip()[-500:]}.") from None


def _prebuilt(library: str) -> ctypes.CDLL:
    variants = runnable_variants(platform.machine(), processor_flags())
    path = next(filter(Path.is_file, (PREBUILT / library_name(one, library) for one in variants)), None)
    if path is None:
        raise _Unavailable("This installation has no kernels for this processor.")
    try:
        # It uses torch's OpenMP, which is already loaded: a machine without a compiler often has no other.
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise _Unavailable(f"The kernels that came with the wheel cannot be loaded: {error}.") from None


def build(compiler: str, library: str = "kernels") -> Path:
    """Returns the path of one of LIBRARIES, compiling it unless it is in the cache. Of two processes, one compiles and one waits.

    Raises:
        subprocess.CalledProcessError: If the compiler fails with every choice of flags.
        OSError: If the cache cannot be written, or somebody else can write to it.
    """
    folder = _own_folder(cache_folder())
    name = f"{library}-{_fingerprint(compiler)}"
    return _cached(folder, name) or _build(compiler, library, folder, name)


def _words(library: str) -> str:
    """What is compiled, and about how long it takes on one core."""
    return {
        "kernels": "the decoding kernels (a quarter of a minute)",
        "integers": "the kernels of quantised layers (a few seconds)",
    }.get(library, f"the kernels that read {library} weights (half a minute)")


def _cached(folder: Path, name: str) -> Path | None:
    return next(filter(_is_whole, folder.glob(f"{name}-*.so")), None)


def _build(compiler: str, library: str, folder: Path, name: str) -> Path:
    with os.fdopen(os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path := _cached(folder, name)) is not None:
            return path
        print(f"sparsify: compiling {_words(library)} for this processor with {compiler}, once.", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            compiled = Path(scratch) / f"{name}.so"
            compile_kernels(compiler, compiled, library=library)
            path = folder / f"{name}-{hashlib.sha256(compiled.read_bytes()).hexdigest()}.so"
            compiled.chmod(0o700)
            compiled.replace(path)
    return path


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
    digest.update(repr((version.stdout, FLAGS, LIBRARIES, THIS_PROCESSOR, _processor())).encode())
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
