"""`sparsify bench groups`: a feed-forward block of which whole groups of neurons are read, against as many scattered neurons."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import BaseModel
from rich.console import RenderableType

from sparsify.bench.column_speed import DTYPES, FORMATS
from sparsify.bench.timing import paired_ratios, quartiles
from sparsify.bench.training_report import QuartileRatio
from sparsify.errors import RecipeError, check_choice
from sparsify.models.activations import ACTIVATIONS
from sparsify.reporting.tables import Table
from sparsify.runtime import FfnWeights, quantise, sparse_ffn
from sparsify.runtime.weights import Matrix, Predictor, Router

DENSE, ROUTED, GROUPED, SCATTERED = "dense", "groups, by a router", "groups, known", "scattered, known"
BASE = {ROUTED: DENSE, GROUPED: SCATTERED}
"""What the time of each is compared with."""


class GroupBench(BaseModel):
    """Attributes:
    seconds: Median of each way to read the block.
    speed: Of pairs measured one after the other: how many times as fast as what BASE says.
    read_share: Rows read, as a share of the block's.
    """

    weights: str
    hidden: int
    neurons: int
    group_size: int
    active_share: float
    threads: int
    repeats: int
    read_share: float
    seconds: dict[str, float]
    speed: dict[str, QuartileRatio]


def bench_groups(
    weights: str,
    *,
    active_share: float,
    group_size: int,
    hidden: int,
    neurons: int,
    threads: int,
    repeats: int,
    on_progress: Callable[[str], object],
) -> GroupBench:
    """Times one token of a SwiGLU block [neurons, hidden] of random weights of which a share of the groups is on, chosen by a router of
    random weights; the same groups known before; and as many scattered neurons. Raises UserError if an argument is out of bounds.
    """
    check_choice("--weights", weights, (*DTYPES, *FORMATS))
    if not 0 < active_share <= 1:
        raise RecipeError(f"--active is {active_share}.", allowed="Above 0, at most 1.")
    if neurons % group_size:
        raise RecipeError(f"--group-size is {group_size}.", allowed=f"A divisor of --neurons ({neurons}).")
    on_progress("Making the weights")
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES.get(weights, torch.bfloat16)

    def random(rows: int) -> torch.Tensor:
        return torch.randn(rows, hidden, generator=generator).div_(hidden**0.5).to(dtype)

    def held(matrix: torch.Tensor) -> Matrix:
        return quantise(matrix, FORMATS[weights]) if weights in FORMATS else matrix

    x, groups = random(1).mul_(hidden**0.5), neurons // group_size
    router = random(groups)
    kept = max(1, round(active_share * groups))
    scores = (x.float() @ router.float().T)[0]
    # Halfway between the last that is kept and the next, so that no rounding matters.
    ordered = scores.sort(descending=True).values
    edge = (ordered[kept - 1] + ordered[kept]) / 2 if kept < groups else ordered[-1] - 1
    on = (scores > edge).repeat_interleave(group_size)
    shuffled = on[torch.randperm(neurons, generator=generator)]
    dense = FfnWeights(held(random(neurons)), held(random(neurons)), held(random(neurons)))
    ways = {
        DENSE: dense,
        ROUTED: replace(dense, router=Router(router, -edge.expand(groups))),
        GROUPED: replace(dense, predictor=_known(on, x).like(x, in_blocks=dense.in_blocks)),
        SCATTERED: replace(dense, predictor=_known(shuffled, x).like(x, in_blocks=dense.in_blocks)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    read: dict[str, int] = {}
    for repeat in range(repeats + 1):
        on_progress("Warming up" if repeat == 0 else f"Round {repeat} of {repeats}")
        for name, own in ways.items():
            start = time.perf_counter()
            _, rows = sparse_ffn(x, own, ACTIVATIONS["swiglu"], dense=name == DENSE, threads=threads)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
            read[name] = rows.total
    assert read[ROUTED] == read[GROUPED] == read[SCATTERED] == 3 * int(on.sum())
    speed = {}
    for name, base in BASE.items():
        middle, lower, upper = quartiles(paired_ratios(seconds[base], seconds[name]))
        speed[name] = QuartileRatio(median=middle, lower_quartile=lower, upper_quartile=upper)
    return GroupBench(
        weights=weights,
        hidden=hidden,
        neurons=neurons,
        group_size=group_size,
        active_share=active_share,
        threads=threads,
        repeats=repeats,
        read_share=read[ROUTED] / read[DENSE],
        seconds={name: quartiles(own)[0] for name, own in seconds.items()},
        speed=speed,
    )


def _known(on: torch.Tensor, x: torch.Tensor) -> Predictor:
    """A predictor of rank 1 that switches these neurons on for this input: next to nothing to read."""
    return Predictor(
        a=x / x.float().square().sum().to(x.dtype), b=torch.where(on, 1.0, -1.0)[:, None].to(x.dtype), threshold=0.0
    )


def groups_table(bench: GroupBench) -> RenderableType:
    table = Table(
        f"One token of a block of {bench.hidden}×{bench.neurons} in {bench.weights}, {bench.threads} threads, "
        f"{bench.active_share:.0%} of the groups of {bench.group_size} on",
        ["neurons read", "ms", "rows read", "times as fast", "interquartile range", "as"],
    )
    for name, seconds in bench.seconds.items():
        share = "100%" if name == DENSE else f"{bench.read_share:.0%}"
        speed = bench.speed.get(name)
        cells = (
            ("", "", "")
            if speed is None
            else (f"{speed.median:.2f}", f"{speed.lower_quartile:.2f} to {speed.upper_quartile:.2f}", BASE[name])
        )
        table.add(name, f"{seconds * 1e3:.2f}", share, *cells)
    return table
