"""The kernels are compiled once, are clean under the sanitizers, and are not missed where there is no compiler."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify.models import ACTIVATIONS
from sparsify.runtime import sparse_ffn
from sparsify.runtime.build import build, find_compiler, kernels, load
from tests.runtime.blocks import block

DRELU = ACTIVATIONS["drelu"]
WITHOUT_COMPILER = """
import warnings, torch
from sparsify.models import ACTIVATIONS
from sparsify.runtime.ffn import native_can, sparse_ffn
from tests.runtime.blocks import block, difference
x, weights = block(3, 40, 90, on=0.03)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for _ in range(2):
        out, rows = sparse_ffn(x, weights, ACTIVATIONS["drelu"])
assert difference(out, x, weights, ACTIVATIONS["drelu"]) < 1e-5
assert 0 < rows.down < rows.gate == 90
assert len(said) == 1, said
print(said[0].message)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("compiler", ["", "/bin/false"])
def test_without_a_working_compiler_torch_takes_over_and_that_is_said_once(compiler: str, tmp_path: Path) -> None:
    path = "/nowhere" if not compiler else os.environ["PATH"]
    result = run(WITHOUT_COMPILER, CXX=compiler, PATH=path, SPARSIFY_KERNEL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stderr
    assert "continues with torch's operators" in result.stdout
    assert ("There is no C++ compiler" if not compiler else "cannot be compiled") in result.stdout


LOADED = """
from pathlib import Path
import torch
from sparsify.models import ACTIVATIONS
from sparsify.runtime import sparse_ffn
from sparsify.runtime.build import LIBRARIES
from tests.runtime.blocks import block, in_format
def loaded():
    names = {Path(line.split()[-1]).name.partition("-")[0] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    return ",".join(sorted(names & set(LIBRARIES)))
x, weights = block(2, 64, 96)
print(loaded())
sparse_ffn(x, weights, ACTIVATIONS["drelu"], backend="native")
print(loaded())
sparse_ffn(x, in_format(weights, "int4")[0], ACTIVATIONS["drelu"], backend="native")
print(loaded())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.usefixtures("native")
def test_only_the_formats_that_are_read_are_compiled_and_loaded() -> None:
    result = run(LOADED)
    assert result.stdout.splitlines() == ["", "f32,kernels", "f32,int4,kernels"], result.stderr


COMPILER = """#!/bin/sh
[ "$1" = --version ] && exec {real} --version
echo "$@" >> {log}
sleep 1
while [ "$1" != -o ]; do shift; done
echo compiled > "$2"
"""


def test_of_two_processes_one_compiles(tmp_path: Path) -> None:
    """The other waits for it, and takes what it compiled."""
    compiler, log = tmp_path / "c++", tmp_path / "log"
    compiler.write_text(COMPILER.format(real="true", log=log))
    compiler.chmod(0o755)
    environment = os.environ | {"SPARSIFY_KERNEL_CACHE": str(tmp_path / "cache")}
    code = f"from sparsify.runtime.build import build; print(build({str(compiler)!r}, 'bf16'))"
    children = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in "ab"
    ]
    paths = {child.communicate(timeout=60)[0] for child in children}
    assert len(paths) == 1
    assert "bf16" in paths.pop()
    assert len(log.read_text().splitlines()) == 1


ONE_FAILS = """
from sparsify.errors import ModelError
from sparsify.models import ACTIVATIONS
from sparsify.runtime import sparse_ffn
from tests.runtime.blocks import block
x, weights = block(2, 64, 96)
try:
    sparse_ffn(x, weights, ACTIVATIONS["drelu"], backend="native")
except ModelError as error:
    print(error)
"""


@pytest.mark.usefixtures("native")
def test_a_format_that_cannot_be_compiled_is_named(tmp_path: Path) -> None:
    real = find_compiler()
    (tmp_path / "cache").mkdir(mode=0o700)
    shutil.copy(build(real), tmp_path / "cache")
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec {real} --version\nexit 1\n')
    compiler.chmod(0o755)
    result = run(ONE_FAILS, CXX=str(compiler), SPARSIFY_KERNEL_CACHE=str(tmp_path / "cache"))
    assert "The kernels that read f32 weights could be neither compiled nor loaded" in result.stdout, result.stderr


@pytest.mark.usefixtures("native")
def test_libraries_for_different_processors_do_not_join() -> None:
    main, format = kernels(), load("f32")
    assert main is not None
    assert format is not None
    table, layout = ctypes.c_void_p(main.sparsify_formats()), main.sparsify_layout()
    assert not format.sparsify_join(table, ctypes.c_int64(layout + 1))
    assert format.sparsify_join(table, ctypes.c_int64(layout))


@pytest.mark.usefixtures("native")
def test_a_second_use_compiles_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    build(find_compiler())
    assert capfd.readouterr().err == ""


def answer(queue) -> None:
    x, weights = block(2, 64, 300)
    queue.put(sparse_ffn(x, weights, DRELU, backend="native", threads=2)[0].tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.usefixtures("native")
def test_a_child_process_computes_the_same(method: str) -> None:
    """After a fork the parent's threads are gone; waiting for them would never end."""
    x, weights = block(2, 64, 300)
    expected, _ = sparse_ffn(x, weights, DRELU, backend="native", threads=2)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=answer, args=(queue,), daemon=True)
    child.start()
    assert torch.equal(torch.tensor(queue.get(timeout=60)), expected)
    child.join(10)
    assert child.exitcode == 0


SANITIZED = """
import dataclasses, itertools
from sparsify.models import ACTIVATIONS
from sparsify.runtime import sparse_ffn
from tests.runtime.blocks import DTYPES, FORMATS, block, in_format, predictor, with_copies
for tokens, hidden, neurons in [(1, 1, 1), (1, 33, 7), (2, 64, 65), (3, 47, 130), (8, 31, 66), (1, 256, 300)]:
    for dtype, format, on, rank, dense in itertools.product(DTYPES, FORMATS, (0.0, 0.3, 1.0), (None, 5, "copies"), (False, True)):
        x, weights = block(tokens, hidden, neurons, dtype, on=on)
        if rank == "copies":
            weights = with_copies(x, weights, ACTIVATIONS["drelu"])
        elif rank:
            weights = dataclasses.replace(weights, predictor=predictor(weights, rank))
        weights, _ = in_format(weights, format)
        sparse_ffn(x, weights, ACTIVATIONS["drelu"], backend="native", threads=3, dense=dense)
print("done")
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["native", "x86-64-v3", "x86-64"])
def test_sanitizers_find_nothing(machine: str, tmp_path: Path) -> None:
    """Address and undefined-behaviour sanitizers, over the vectors of three generations of processors."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = "-g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all"
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -march={machine} {flags}\n')
    wrapper.chmod(0o755)
    libraries = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    result = run(
        SANITIZED,
        CXX=str(wrapper),
        SPARSIFY_KERNEL_CACHE=str(tmp_path / "cache"),
        LD_PRELOAD=":".join(libraries),
        ASAN_OPTIONS="detect_leaks=0",
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout == "done\n"


@pytest.mark.slow
@pytest.mark.parametrize("machine", ["x86-64-v3", "x86-64"])
def test_older_processors_compute_the_same(machine: str, tmp_path: Path) -> None:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    wrapper = tmp_path / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -march={machine}\n')
    wrapper.chmod(0o755)
    tests = str(Path(__file__).with_name("test_ffn.py"))
    code = f"import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', {tests!r}]))"
    result = run(code, CXX=str(wrapper), SPARSIFY_KERNEL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stdout[-3000:]
