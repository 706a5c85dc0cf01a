"""The Triton kernels compute the dense block, and compile for a GPU that is not here. Without Triton, torch takes over."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify.models.masking import NUMBERS, RULES, SiteMask, SiteRule
from sparsify.runtime import triton_ffn
from sparsify.runtime.triton_columns import launch_columns, launch_mask
from sparsify.runtime.triton_ffn import BLOCKS, Routing, launch
from tests.runtime.blocks import ALL, block, predictor
from tests.triton import run_checks

CHECKS = Path(__file__).with_name("triton_checks.py")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="no Triton")


@needs_triton
@pytest.mark.parametrize("examples", ["8", pytest.param("100", marks=pytest.mark.slow)])
def test_kernels_do_what_they_must(examples: str) -> None:
    """On the GPU, or in Triton's interpreter."""
    run_checks(CHECKS, TRITON_EXAMPLES=examples)


class HopperCompiler:
    """In place of the kernels' module: compiles for a Hopper GPU what it is asked to start, and keeps what that needs."""

    def __init__(self) -> None:
        self.cubins: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        from sparsify.runtime import triton_kernels

        kernel = getattr(triton_kernels, name)

        class Started:
            def __class_getitem__(cls, _grid: object) -> Callable[..., None]:
                return lambda *given, **named: self._compile(kernel, given, named)

        return Started

    def _compile(self, kernel: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        num_warps = named.pop("num_warps")
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        assert list(values) == list(dict.fromkeys([*values, *kernel.arg_names]))
        signature, constants, hints = {}, {}, {}
        for place, name in enumerate(kernel.arg_names):
            value = values[name]
            if name in named or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = f"*{POINTERS[value.dtype]}"
                hints[(place,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
                if isinstance(value, int) and value % 16 == 0:
                    hints[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, hints)
        target = GPUTarget("cuda", 90, 32)
        made = triton.compile(source, target=target, options={"num_warps": num_warps})
        self.cubins[f"{len(self.cubins)}-{kernel.__name__}"] = made.asm["cubin"]
        assert "ld.global.v4" in made.asm["ptx"] or "sum" in kernel.__name__


POINTERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int64: "i64"}


@needs_triton
@pytest.mark.skipif(triton_ffn.interpreting(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize("tokens", [pytest.param(t, marks=[pytest.mark.slow] if t in (2, 4) else []) for t in BLOCKS])
@pytest.mark.parametrize("routed", [False, True])
def test_kernels_compile_for_hopper_and_keep_their_sums_in_registers(
    tokens: int, routed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    x, weights = block(tokens, 64, 128, torch.bfloat16 if routed else torch.float32)
    weights = dataclasses.replace(weights, thresholds=torch.zeros(128))
    weights = dataclasses.replace(weights, predictor=predictor(weights, 16))
    routing = None
    if routed:
        routing = Routing(torch.zeros(tokens, 2, dtype=torch.int64), torch.ones(tokens, 2))
    compiler: Any = HopperCompiler()
    launch(compiler, x, weights, ALL["swiglu"], x, False, routing)
    assert len(compiler.cubins) == 6
    columns = {name: getattr(weights, name).mT.contiguous() for name in ("gate", "up")}
    by_columns = dataclasses.replace(weights, predictor=None, by_columns=frozenset(columns), **columns)
    launch(compiler, x, by_columns, ALL["swiglu"], x, False, routing)
    if not routed:
        launch_columns(compiler, x.bfloat16(), columns["up"].bfloat16(), torch.zeros(4, dtype=torch.int64), 3)
        for rule in RULES:
            mask = SiteMask(SiteRule(rule, weighted=rule != "threshold"), {NUMBERS[rule]: (1,), "weight": (4096,)})
            launch_mask(compiler, mask, torch.zeros(tokens, 4096, dtype=torch.bfloat16), 1)
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for name, cubin in compiler.cubins.items():
        (tmp_path / name).write_bytes(cubin)
        command = [str(cuobjdump), "-res-usage", str(tmp_path / name)]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, stack, local = re.findall(r"(?:REG|STACK|LOCAL):(\d+)", used)
        assert (stack, local) == ("0", "0"), f"{name} spills: {used}"
        assert int(registers) <= 128, f"{name}: {used}"


def test_without_triton_torch_takes_over_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_ffn, "find_spec", lambda _: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as a GPU would, it asks for Triton
    triton_ffn.triton_kernels.cache_clear()
    x = torch.zeros(1, 4)
    with pytest.warns(UserWarning, match=r"There is no Triton here\. .*continues with torch") as said:
        assert not any(triton_ffn.triton_can(x) for _ in range(2))
    assert len(said) == 1
    triton_ffn.triton_kernels.cache_clear()
