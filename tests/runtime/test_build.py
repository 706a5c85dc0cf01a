"""The kernels are compiled once, are clean under the sanitizers, and are not missed where there is no compiler."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsify.models import ACTIVATIONS
from sparsify.runtime import sparse_ffn
from sparsify.runtime.build import build, find_compiler
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
