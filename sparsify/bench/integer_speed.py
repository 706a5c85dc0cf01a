"""`sparsify bench integers`: the three products of a feed-forward block in integers, against int4 blocks, torch, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import BaseModel
from rich.console import Group, RenderableType
from torch.nn.functional import linear, silu

from sparsify.bench.timing import OUT_OF_CACHE_BYTES, paired_ratios, quartiles, read_data
from sparsify.bench.training_report import QuartileRatio
from sparsify.errors import RecipeError
from sparsify.models.activations import ACTIVATIONS
from sparsify.reporting.tables import Table
from sparsify.runtime import FfnWeights, quantise, sparse_ffn
from sparsify.runtime.integer_products import TiledMatrix, integer_kernels, integer_product, tiled

SMOOTH_GROUP = 128
FULL_REPEATS = 16
"""Tokens up to which there are all repeats; longer prompts have a fifth of them."""
Product = Callable[[torch.Tensor], torch.Tensor]
Ways = dict[str, tuple[Product, int]]
"""What is timed by name, and the bytes of its weights."""


class IntegerTiming(BaseModel):
    way: str
    neurons: int
    tokens: int
    seconds: float
    """Median."""
    bytes_read: int
    """Of weights, scales included."""
    speed: QuartileRatio
    """Speed-up over torch's bf16, of pairs measured in the same round."""


class IntegerBench(BaseModel):
    hidden: int
    threads: int
    repeats: int
    bytes_per_second: float
    """What reading memory alone reaches: the median."""
    timings: list[IntegerTiming]


def bench_integers(
    hidden: int,
    neurons: Sequence[int],
    tokens: Sequence[int],
    threads: int,
    repeats: int,
    on_progress: Callable[[str], object],
) -> IntegerBench:
    """Times all products of SwiGLU blocks [neurons, hidden] of random weights, every way once a round, so that the weights of one are
    not in the cache of the next.

    Raises:
        RecipeError: Without the compiled kernels.
    """
    if integer_kernels() is None:
        raise RecipeError("There are no compiled kernels to measure.", next_step="Install a C++ compiler.")
    torch.set_num_threads(threads)
    memory = torch.zeros(OUT_OF_CACHE_BYTES // 4)
    reading = quartiles([_seconds(lambda: read_data(memory, threads)) for _ in range(repeats + 1)])[0]
    timings = []
    for width in neurons:
        on_progress(f"Making the weights of {width} neurons")
        ways = _ways(hidden, width, threads)
        for count in tokens:
            x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(0))
            rounds = repeats if count <= FULL_REPEATS else max(3, repeats // 5)
            taken = _rounds(
                ways, x, rounds, lambda said, at=f"{width} neurons, {count} tokens": on_progress(f"{at}: {said}")
            )
            for name, (_, size) in ways.items():
                middle, lower, upper = quartiles(paired_ratios(taken[BASELINE], taken[name]))
                speed = QuartileRatio(median=middle, lower_quartile=lower, upper_quartile=upper)
                seconds = quartiles(taken[name])[0]
                timings.append(
                    IntegerTiming(way=name, neurons=width, tokens=count, seconds=seconds, bytes_read=size, speed=speed)
                )
    return IntegerBench(
        hidden=hidden,
        threads=threads,
        repeats=repeats,
        bytes_per_second=memory.nbytes / reading,
        timings=timings,
    )


def _rounds(ways: Ways, x: torch.Tensor, rounds: int, on_progress: Callable[[str], object]) -> dict[str, list[float]]:
    """Seconds of each round, after one to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        on_progress("warming up" if number == 0 else f"round {number} of {rounds}")
        for name, (run, _) in ways.items():
            seconds = _seconds(partial(run, x))
            if number:
                taken[name].append(seconds)
    return taken


BASELINE = "torch, bf16"


def _ways(hidden: int, neurons: int, threads: int) -> Ways:
    """The ways by name, and the bytes of weights of each; those that share weights are not next to each other."""

    def integers(matrices: Sequence[TiledMatrix], bits: int, group: int | None = None) -> tuple[Product, int]:
        products = [
            partial(integer_product, matrix=one, activation_bits=bits, smooth_group=group, threads=threads)
            for one in matrices
        ]
        return partial(_block, products), sum(one.nbytes for one in matrices)

    generator = torch.Generator().manual_seed(0)
    shapes = ((neurons, hidden), (neurons, hidden), (hidden, neurons))
    weights = [torch.randn(*shape, generator=generator).div_(shape[1] ** 0.5) for shape in shapes]
    plain = [one.bfloat16() for one in weights]
    four, eight = ([_integer(one, bits) for one in weights] for bits in (4, 8))
    in_blocks = FfnWeights(quantise(weights[0], "int4"), quantise(weights[1], "int4"), quantise(weights[2].T, "int4"))
    blocks_bytes = sum(one.nbytes for one in (in_blocks.gate, in_blocks.up, in_blocks.down_t))
    swiglu = ACTIVATIONS["swiglu"]
    return {
        "W4A4": integers(four, 4),
        BASELINE: (partial(_torch_block, plain), sum(one.nbytes for one in plain)),
        f"W4A4, smoothed by {SMOOTH_GROUP}": integers(four, 4, SMOOTH_GROUP),
        "int4 blocks": (lambda x: sparse_ffn(x, in_blocks, swiglu, dense=True, threads=threads)[0], blocks_bytes),
        "W4A16": integers(four, 16),
        "torch, fp32": (partial(_torch_block, weights), sum(one.nbytes for one in weights)),
        "W8A8": integers(eight, 8),
    }


def _block(products: Sequence[Product], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = products
    return down(silu(gate(x)) * up(x))


def _torch_block(weights: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return _block([partial(linear, weight=one) for one in weights], x.to(weights[0].dtype))


def _integer(weight: torch.Tensor, bits: int) -> TiledMatrix:
    scales = weight.abs().amax(1) / (2 ** (bits - 1) - 1)
    return tiled((weight / scales[:, None]).round().to(torch.int8), scales, bits)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def integers_table(bench: IntegerBench) -> RenderableType:
    shown = dict.fromkeys((one.neurons, one.tokens) for one in bench.timings)
    return Group(*(_table(bench, *one) for one in shown))


def _table(bench: IntegerBench, neurons: int, tokens: int) -> Table:
    table = Table(
        f"{tokens} token{'s' if tokens > 1 else ''}, a block of {bench.hidden}×{neurons}, {bench.threads} threads",
        ["", "ms", "times as fast as bf16", "interquartile range", "MB of weights", "reading them alone, ms"],
    )
    shown = (one for one in bench.timings if (one.neurons, one.tokens) == (neurons, tokens))
    for one in sorted(shown, key=lambda one: -one.seconds):
        table.add(
            one.way,
            f"{one.seconds * 1e3:.2f}",
            f"{one.speed.median:.2f}",
            f"{one.speed.lower_quartile:.2f} to {one.speed.upper_quartile:.2f}",
            f"{one.bytes_read / 1e6:.0f}",
            f"{one.bytes_read / bench.bytes_per_second * 1e3:.2f}",
        )
    return table
