"""The commands that turn the C++ sources into a library: at first use (build.py) and for a wheel (hatch_build.py).

The wheel's build loads this file alone, so it imports nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
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
