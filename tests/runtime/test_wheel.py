"""A wheel brings the kernels if there was a compiler where it was built, and decodes without them if there was none."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sparsify.runtime.build import (
    LIBRARIES,
    find_compiler,
    library_name,
    processor_flags,
    runnable_variants,
    variants,
)
from tests.conftest import Shared

ROOT = Path(__file__).parents[2]
HASWELL = (
    "fpu sse sse2 ht syscall nx lm pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 movbe popcnt aes xsave avx f16c rdrand "
    "lahf_lm abm bmi1 avx2 bmi2"
)
SKYLAKE_X = HASWELL + " avx512f avx512dq avx512cd avx512bw avx512vl"
CASCADE_LAKE = SKYLAKE_X + " avx512_vnni"
ALDER_LAKE = HASWELL + " avx_vnni"
KNIGHTS_LANDING = HASWELL + " avx512f avx512pf avx512er avx512cd"
BULLDOZER = "fpu sse sse2 lm pni ssse3 cx16 sse4_1 sse4_2 popcnt xsave avx f16c fma fma4 lahf_lm abm bmi1"
WITHOUT_AVX2 = HASWELL.replace(" avx2", "") + " avx512f avx512dq avx512cd avx512bw"

COMPUTE = """
import sys, warnings
from pathlib import Path
from sparsify.models import ACTIVATIONS
from sparsify.runtime import build, sparse_ffn
from sparsify.models.quantised import rounded_states
from tests.runtime.blocks import FORMATS, block, difference, in_format
assert Path(build.__file__).is_relative_to(sys.argv[1]), build.__file__
backend, library = sys.argv[2:]
x, weights = block(3, 40, 90, on=0.03)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for format in FORMATS:
        given, meant = in_format(weights, format)
        out, rows = sparse_ffn(x, given, ACTIVATIONS["drelu"], backend=backend, threads=2)
        assert difference(out, x, meant, ACTIVATIONS["drelu"], rounded_states(x) if format else x) < 2e-5
        assert 0 < rows.down < rows.gate == 90
if library:
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
    assert [Path(path).name for path in mapped if Path(path).name.startswith("kernels-")] == [library], mapped
    assert all("torch" in path for path in mapped if "libgomp" in path), "not every machine has OpenMP"
print(*(warning.message for warning in said))
"""


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", CASCADE_LAKE, ["x86-64-v4-vnni", "x86-64-v4", "x86-64-v3", "x86-64"]),
        ("x86_64", ALDER_LAKE, ["x86-64-v3", "x86-64"]),
        ("x86_64", SKYLAKE_X, ["x86-64-v4", "x86-64-v3", "x86-64"]),
        ("x86_64", HASWELL, ["x86-64-v3", "x86-64"]),
        ("x86_64", KNIGHTS_LANDING, ["x86-64-v3", "x86-64"]),
        ("x86_64", BULLDOZER, ["x86-64"]),
        ("x86_64", WITHOUT_AVX2, ["x86-64"]),
        ("AMD64", "", ["x86-64"]),
        ("aarch64", "", ["aarch64"]),
        ("arm64", "", ["arm64"]),
    ],
)
def test_a_processor_gets_no_library_that_it_cannot_run(machine: str, flags: str, expected: list[str]) -> None:
    assert runnable_variants(machine, set(flags.split())) == expected


def build_wheel(to: Path, **environment: str) -> None:
    """Unpacked into `to`; its tag, where its installer looks for it, stays in *.dist-info/WHEEL."""
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
    # hatchling is among the dev dependencies: no network.
    command += ["--no-build-isolation", "-w", str(to), str(ROOT)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = to.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(to)
    wheel.unlink()


@pytest.fixture(scope="session")
def wheel_with_kernels(shared: Shared) -> Path:
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    return shared("wheel", build_wheel)


@pytest.fixture(scope="session")
def pure_wheel(shared: Shared) -> Path:
    return shared("pure_wheel", lambda to: build_wheel(to, CXX="/nowhere/c++"))


def said_by(wheel: Path) -> str:
    (path,) = wheel.glob("*.dist-info/WHEEL")
    return path.read_text()


def compute(wheel: Path, tmp_path: Path, backend: str, library: str = "", **environment: str):
    """Computes a block with the wheel's package and returns what was warned of."""
    paths = {
        "PYTHONPATH": os.pathsep.join(map(str, (wheel, ROOT))),
        "SPARSIFY_KERNEL_CACHE": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        [sys.executable, "-c", COMPUTE, str(wheel), backend, library],
        cwd=tmp_path,
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


NO_COMPILER = {"CXX": "", "PATH": "/nowhere"}


@pytest.mark.slow
@pytest.mark.timeout(2400)  # compiles the kernels for several levels of processors
@pytest.mark.parametrize("variant", variants(platform.machine()))
def test_every_library_of_a_wheel_computes_without_a_compiler(
    variant: str, wheel_with_kernels: Path, tmp_path: Path
) -> None:
    runnable = runnable_variants(platform.machine(), processor_flags())
    assert "Root-Is-Purelib: false" in said_by(wheel_with_kernels)
    assert "py3-none-any" not in said_by(wheel_with_kernels)
    for library in LIBRARIES:
        assert (wheel_with_kernels / "sparsify/runtime/prebuilt" / library_name(variant, library)).is_file()
    if variant not in runnable:
        pytest.skip(f"this processor does not run {variant}")
    wheel = shutil.copytree(wheel_with_kernels, tmp_path / "wheel")
    for better in runnable[: runnable.index(variant)]:
        for library in LIBRARIES:
            (wheel / "sparsify/runtime/prebuilt" / library_name(better, library)).unlink()
    library = library_name(variant) if sys.platform == "linux" else ""
    assert compute(wheel, tmp_path, "native", library, **NO_COMPILER) == ""


@pytest.mark.slow
@pytest.mark.timeout(2400)  # compiles the kernels for several levels of processors
def test_where_the_compiler_fails_the_wheels_kernels_do(wheel_with_kernels: Path, tmp_path: Path) -> None:
    said = compute(wheel_with_kernels, tmp_path, "native", CXX="/bin/false")
    assert "cannot be compiled with /bin/false" in said
    assert "that came with the wheel are used instead" in said


@pytest.mark.slow
@pytest.mark.timeout(2400)  # compiles the kernels for several levels of processors
def test_a_wheel_built_without_a_compiler_is_pure_python(pure_wheel: Path, tmp_path: Path) -> None:
    assert "Root-Is-Purelib: true" in said_by(pure_wheel)
    assert "Tag: py3-none-any" in said_by(pure_wheel)
    assert not (pure_wheel / "sparsify/runtime/prebuilt").exists()
    assert "continues with torch's operators" in compute(pure_wheel, tmp_path, "auto", **NO_COMPILER)
    if find_compiler():
        assert compute(pure_wheel, tmp_path, "native") == ""
