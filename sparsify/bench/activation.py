"""`sparsify bench activation`: the fused activation beside eager torch and beside a plain copy of the same memory."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from pydantic import BaseModel
from rich.console import Group, RenderableType

from sparsify.bench.timing import clock, middle_half, paired_ratios
from sparsify.bench.training_report import Ratio
from sparsify.errors import RecipeError, check_choice
from sparsify.models import FfnActivation
from sparsify.models.activations import activation_names
from sparsify.reporting.tables import Table
from sparsify.training.kernels.activation import fastest_implementation, fuse

Activation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
FORWARD_PASSES, BOTH_PASSES, COPY_PASSES = 3, 8, 2
"""Tensors that must be read or written at least: gate, up and product; with these the gradient, gate and up again, and
two gradients; a copy's two."""
GPU_CALLS = 20
"""Calls between two looks at the clock, so that waiting for the GPU does not count."""


class Way(BaseModel):
    """One way to compute the activation."""

    name: str
    forward_seconds: float
    both_seconds: float
    """Forward and backward."""
    forward_bandwidth_share: float
    """Of the bandwidth of a copy, when only what must be read and written counts."""
    both_bandwidth_share: float
    forward_speed: Ratio | None = None
    """As many times as fast as eager."""
    both_speed: Ratio | None = None


class ActivationBench(BaseModel):
    """The ways over the same pre-activations."""

    activation: str
    tokens: int
    neurons: int
    dtype: str
    device: str
    clock: str
    threads: int
    repeats: int
    copy_bytes_per_second: float
    ways: list[Way]


def bench_activation(
    activation: str,
    *,
    tokens: int,
    neurons: int,
    dtype: str,
    repeats: int,
    on_progress: Callable[[str], object],
) -> ActivationBench:
    """Measures one activation.

    Args:
        activation: Name of one that has a training kernel.
        tokens: Rows of the pre-activations.
        neurons: Columns.
        dtype: `bf16` or `fp32`.
        repeats: Measured rounds, after one to warm up.
        on_progress: Told what is being measured.

    Raises:
        UserError: If an argument is none of those allowed, or the kernel does not work here.
    """
    with_kernel = activation_names(lambda row: row.has_training_kernel)
    check_choice("--activation", activation, with_kernel)
    check_choice("--dtype", dtype, ("bf16", "fp32"))
    for name, number in {"tokens": tokens, "neurons": neurons, "repeats": repeats}.items():
        if number < 1:
            raise RecipeError(f"--{name} is {number}.", allowed="It must be 1 or more.")
    cuda = torch.cuda.is_available()
    if not cuda:
        torch.set_num_threads(1)  # a waiting thread of OpenMP spins, which would count as work
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    values = torch.randn(3, tokens, neurons, device="cuda" if cuda else "cpu").to(kind)
    grad, gate, up = values.unbind(0)
    on_progress("Building the kernel")
    ways = _ways(activation)
    works: dict[str, Callable[[], object]] = {"copy": gate.clone}
    for name, way in ways.items():
        # Of its own: some kernels write gradients over what they were given.
        own = gate.clone().requires_grad_(), up.clone().requires_grad_()
        works[f"{name} forward"] = _forward(way, *own)
        works[f"{name} both"] = _both(way, *own, grad)
    seconds = _take_turns(works, repeats, GPU_CALLS if cuda else 1, on_progress)
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
        ways=[_measured(name, seconds, copy) for name in ways],
    )


def _ways(activation: str) -> dict[str, Activation]:
    implementation = fastest_implementation()
    ways: dict[str, Activation] = {
        "eager": FfnActivation(activation),
        implementation: fuse(FfnActivation(activation), implementation),
    }
    if torch.cuda.is_available() and find_spec("liger_kernel") is not None:
        from liger_kernel.ops.swiglu import (  # pyright: ignore[reportMissingImports]
            LigerSiLUMulFunction,
        )

        ways["Liger's swiglu"] = LigerSiLUMulFunction.apply
    return ways


def _forward(way: Activation, gate: torch.Tensor, up: torch.Tensor) -> Callable[[], object]:
    return lambda: way(gate, up)


def _both(
    way: Activation, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor
) -> Callable[[], object]:
    return lambda: torch.autograd.grad(way(gate, up), (gate, up), grad)


def _take_turns(
    works: dict[str, Callable[[], object]],
    repeats: int,
    calls: int,
    on_progress: Callable[[str], object],
) -> dict[str, list[float]]:
    """Seconds of one call of each work in every round, each round in another order."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    names = list(works)
    for repeat in range(repeats + 1):
        on_progress("Warming up" if repeat == 0 else f"Round {repeat} of {repeats}")
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            started = clock()
            for _ in range(calls):
                works[name]()
            if repeat:
                seconds[name].append((clock() - started) / calls)
    return seconds


def _measured(name: str, seconds: dict[str, list[float]], copy: float) -> Way:
    forward, both = seconds[f"{name} forward"], seconds[f"{name} both"]
    way = Way(
        name=name,
        forward_seconds=median(forward),
        both_seconds=median(both),
        forward_bandwidth_share=FORWARD_PASSES / median(forward) / copy,
        both_bandwidth_share=BOTH_PASSES / median(both) / copy,
    )
    if name != "eager":
        way.forward_speed = _speed(seconds["eager forward"], forward)
        way.both_speed = _speed(seconds["eager both"], both)
    return way


def _speed(eager: list[float], own: list[float]) -> Ratio:
    middle, lower, upper = middle_half(paired_ratios(eager, own))
    return Ratio(median=middle, lower_quartile=lower, upper_quartile=upper)


def activation_table(bench: ActivationBench) -> RenderableType:
    """The ways as a table, and what the numbers rest on."""
    table = Table(
        f"{bench.activation} of {bench.tokens:,} × {bench.neurons:,} {bench.dtype}",
        ["", "time", "× eager", "middle half", "of a copy"],
    )
    for way in bench.ways:
        table.add(
            f"{way.name}, forward",
            f"{way.forward_seconds * 1e3:,.2f} ms",
            *_cells(way.forward_speed),
            f"{way.forward_bandwidth_share:.0%}",
        )
        table.add(
            f"{way.name}, with backward",
            f"{way.both_seconds * 1e3:,.2f} ms",
            *_cells(way.both_speed),
            f"{way.both_bandwidth_share:.0%}",
        )
    rests_on = (
        f"[dim]{bench.device}, {bench.threads} CPU thread(s). Clock: {bench.clock}. Medians of {bench.repeats} round(s), taken "
        "in turns.\n"
        f"of a copy: share of the {bench.copy_bytes_per_second / 1e9:,.1f} GB/s of a copy into new memory that reading "
        "and writing every tensor once would take.[/dim]"
    )
    return Group("", table, rests_on)


def _cells(ratio: Ratio | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f}", f"{ratio.lower_quartile:.2f} to {ratio.upper_quartile:.2f}"
