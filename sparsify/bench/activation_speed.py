"""`sparsify bench activation`: the fused activation against eager torch and against a copy of the same memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.bench.timing import paired_ratios, quartiles, work_seconds
from sparsify.bench.training_report import QuartileRatio
from sparsify.errors import RecipeError, check_choice
from sparsify.models import FfnActivation
from sparsify.models.activations import activation_names
from sparsify.reporting.tables import Table
from sparsify.training.kernels.activation import fastest_implementation, fuse

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FORWARD_PASSES, BOTH_PASSES, COPY_PASSES = 3, 8, 2
"""Minimum number of tensors read or written. Forward: gate, up, product. Both: in addition the gradient, gate and up again, and
two gradients. A copy: two."""
GPU_CALLS = 20
"""Calls per time measurement, so that waiting for the GPU does not count."""


class ImplementationTiming(BaseModel):
    name: str
    forward_seconds: float
    both_seconds: float
    """Forward and backward."""
    forward_bandwidth_share: float
    """Share of a copy's bandwidth, counting only the minimum of reads and writes."""
    both_bandwidth_share: float
    forward_speed: QuartileRatio | None = None
    """Speed-up over eager."""
    both_speed: QuartileRatio | None = None


class ActivationBench(BaseModel):
    activation: str
    tokens: int
    neurons: int
    dtype: str
    device: str
    clock: str
    threads: int
    repeats: int
    copy_bytes_per_second: float
    implementations: list[ImplementationTiming]


def bench_activation(
    activation: str,
    *,
    tokens: int,
    neurons: int,
    dtype: str,
    repeats: int,
    on_progress: Callable[[str], object],
) -> ActivationBench:
    """Measures one activation on pre-activations [tokens, neurons], `repeats` rounds after one warm-up round. Raises
    UserError if the kernel does not work on this machine.
    """
    with_kernel = activation_names(lambda row: row.has_training_kernel)
    check_choice("--activation", activation, with_kernel)
    check_choice("--dtype", dtype, ("bf16", "fp32"))
    for name, number in {"tokens": tokens, "neurons": neurons, "repeats": repeats}.items():
        if number < 1:
            raise RecipeError(f"--{name} is {number}.", allowed="It must be 1 or more.")
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)  # waiting OpenMP threads spin, which would count as CPU time
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    values = torch.randn(3, tokens, neurons, device="cuda" if cuda else "cpu").to(kind)
    grad, gate, up = values.unbind(0)
    on_progress("Building the kernel")
    implementations = _implementations(activation)
    functions: dict[str, Callable[[], object]] = {"copy": gate.clone}
    for name, implementation in implementations.items():
        # Separate copies, since some kernels overwrite their inputs with gradients.
        own = gate.clone().requires_grad_(), up.clone().requires_grad_()
        functions[f"{name} forward"] = _forward(implementation, *own)
        functions[f"{name} both"] = _both(implementation, *own, grad)
    seconds = _time_interleaved(functions, repeats, GPU_CALLS if cuda else 1, on_progress)
    copy = COPY_PASSES / median(seconds["copy"])
    return ActivationBench(
        activation=activation,
        tokens=tokens,
        neurons=neurons,
        dtype=dtype,
        device=torch.cuda.get_device_name() if cuda else "cpu",
        clock="wall" if cuda else "CPU time of this process",
        threads=torch.get_num_threads(),
        repeats=repeats,
        copy_bytes_per_second=copy * gate.numel() * gate.element_size(),
        implementations=[_measured(name, seconds, copy) for name in implementations],
    )


def _implementations(activation: str) -> dict[str, Activation]:
    implementation = fastest_implementation()
    implementations: dict[str, Activation] = {
        "eager": FfnActivation(activation),
        implementation: fuse(FfnActivation(activation), implementation),
    }
    if torch.cuda.is_available() and find_spec("liger_kernel") is not None:
        from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
            LigerSiLUMulFunction,
        )

        implementations["Liger's swiglu"] = LigerSiLUMulFunction.apply
    return implementations


def _forward(implementation: Activation, gate: torch.Tensor, up: torch.Tensor) -> Callable[[], object]:
    return lambda: implementation(gate, up)


def _both(implementation: Activation, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(implementation(gate, up), (gate, up), grad)


def _time_interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int,
    calls: int,
    on_progress: Callable[[str], object],
) -> dict[str, list[float]]:
    """Seconds per call of each function in every round; the order changes from round to round."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for repeat in range(repeats + 1):
        on_progress("Warming up" if repeat == 0 else f"Round {repeat} of {repeats}")
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            started = work_seconds()
            for _ in range(calls):
                functions[name]()
            if repeat:
                seconds[name].append((work_seconds() - started) / calls)
    return seconds


def _measured(name: str, seconds: dict[str, list[float]], copy: float) -> ImplementationTiming:
    forward, both = seconds[f"{name} forward"], seconds[f"{name} both"]
    implementation = ImplementationTiming(
        name=name,
        forward_seconds=median(forward),
        both_seconds=median(both),
        forward_bandwidth_share=FORWARD_PASSES / median(forward) / copy,
        both_bandwidth_share=BOTH_PASSES / median(both) / copy,
    )
    if name != "eager":
        implementation.forward_speed = _speed(seconds["eager forward"], forward)
        implementation.both_speed = _speed(seconds["eager both"], both)
    return implementation


def _speed(eager: list[float], own: list[float]) -> QuartileRatio:
    middle, lower, upper = quartiles(paired_ratios(eager, own))
    return QuartileRatio(median=middle, lower_quartile=lower, upper_quartile=upper)


def activation_table(bench: ActivationBench) -> RenderableType:
    table = Table(
        f"{bench.activation} of {bench.tokens:,} × {bench.neurons:,} {bench.dtype}",
        ["", "time", "× eager", "interquartile range", "of a copy"],
    )
    for implementation in bench.implementations:
        table.add(
            f"{implementation.name}, forward",
            f"{implementation.forward_seconds * 1e3:,.2f} ms",
            *_cells(implementation.forward_speed),
            f"{implementation.forward_bandwidth_share:.0%}",
        )
        table.add(
            f"{implementation.name}, with backward",
            f"{implementation.both_seconds * 1e3:,.2f} ms",
            *_cells(implementation.both_speed),
            f"{implementation.both_bandwidth_share:.0%}",
        )
    rests_on = Text(
        f"{bench.device}, {bench.threads} CPU thread(s). Clock: {bench.clock}. Medians of {bench.repeats} interleaved "
        "round(s).\n"
        "of a copy: bandwidth if every tensor is read or written once, as a share of the "
        f"{bench.copy_bytes_per_second / 1e9:,.1f} GB/s of a copy into new memory.",
        "dim",
    )
    return Group("", table, rests_on)


def _cells(ratio: QuartileRatio | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f}", f"{ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f}"
