"""`sparsify bench columns`: a feed-forward block with masked inputs, read by columns, against the dense C++ kernel by rows."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from pydantic import BaseModel
from rich.console import RenderableType

from sparsify.bench.timing import paired_ratios, quartiles
from sparsify.bench.training_report import QuartileRatio
from sparsify.errors import RecipeError, check_choice
from sparsify.models.activations import ACTIVATIONS
from sparsify.models.quantised import BlockFormat
from sparsify.reporting.tables import Table
from sparsify.runtime import FfnWeights, RowsRead, quantise, sparse_ffn
from sparsify.runtime.weights import Matrix

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMATS: dict[str, BlockFormat] = {"int8": "int8", "int4": "int4"}


class ColumnBench(BaseModel):
    weights: str
    hidden: int
    neurons: int
    kept_share: float
    threads: int
    repeats: int
    dense_seconds: float
    """Median."""
    columns_seconds: float
    read_share: float
    """Bytes of weights read, as a share of the dense block's."""
    speed: QuartileRatio
    """Speed-up over the dense C++ kernel, of pairs measured one after the other."""


def bench_columns(
    weights: str,
    *,
    kept_share: float,
    hidden: int,
    neurons: int,
    threads: int,
    repeats: int,
    on_progress: Callable[[str], object],
) -> ColumnBench:
    """Times one token of a SwiGLU block [neurons, hidden] of random weights of which a share of the elements of both inputs, that of
    gate and up and that of down, is kept. Raises UserError if an argument is out of bounds.
    """
    check_choice("--weights", weights, (*DTYPES, *FORMATS))
    if not 0 < kept_share <= 1:
        raise RecipeError(f"--kept is {kept_share}.", allowed="Above 0, at most 1.")
    on_progress("Making the weights")
    generator = torch.Generator().manual_seed(0)
    dtype = DTYPES.get(weights, torch.bfloat16)
    gate, up, down_t = (torch.randn(neurons, hidden, generator=generator).div_(hidden**0.5).to(dtype) for _ in range(3))
    x = torch.randn(1, hidden, generator=generator).to(dtype)
    x = torch.where(torch.rand(1, hidden, generator=generator) < kept_share, x, 0.0)
    swiglu = ACTIVATIONS["swiglu"]
    products = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
    # Below all products if none is dropped.
    threshold = products.float().abs().quantile(1 - kept_share).reshape(1) if kept_share < 1 else torch.full((1,), -1.0)

    def held(matrix: torch.Tensor, *, by_columns: bool = True) -> Matrix:
        if weights in FORMATS:
            return quantise(matrix, FORMATS[weights], by_columns=by_columns)
        return matrix.contiguous()

    by_rows = FfnWeights(held(gate, by_columns=False), held(up, by_columns=False), held(down_t))
    by_columns = replace(
        by_rows,
        gate=held(gate.T),
        up=held(up.T),
        thresholds=threshold,
        by_columns=frozenset({"gate", "up"}),
    )
    del gate, up
    dense: list[float] = []
    columns: list[float] = []
    rows = RowsRead()
    for repeat in range(repeats + 1):
        on_progress("Warming up" if repeat == 0 else f"Round {repeat} of {repeats}")
        start = time.perf_counter()
        sparse_ffn(x, by_rows, swiglu, dense=True, threads=threads)
        between = time.perf_counter()
        _, rows = sparse_ffn(x, by_columns, swiglu, threads=threads)
        end = time.perf_counter()
        if repeat:
            dense.append(between - start)
            columns.append(end - between)
    middle, lower, upper = quartiles(paired_ratios(dense, columns))
    sizes = by_columns.read_bytes
    return ColumnBench(
        weights=weights,
        hidden=hidden,
        neurons=neurons,
        kept_share=kept_share,
        threads=threads,
        repeats=repeats,
        dense_seconds=quartiles(dense)[0],
        columns_seconds=quartiles(columns)[0],
        read_share=sizes.weights(rows) / (sizes.dense * rows.offered),
        speed=QuartileRatio(median=middle, lower_quartile=lower, upper_quartile=upper),
    )


def columns_table(bench: ColumnBench) -> RenderableType:
    table = Table(
        f"One token of a block of {bench.hidden}×{bench.neurons} in {bench.weights}, {bench.threads} threads, "
        f"{bench.kept_share:.0%} of the inputs kept",
        ["", "ms", "bytes read", "times as fast", "interquartile range", "bytes allow"],
    )
    speed = bench.speed
    table.add("dense, by rows", f"{bench.dense_seconds * 1e3:.2f}", "100%", "1", "", "1")
    table.add(
        "by columns",
        f"{bench.columns_seconds * 1e3:.2f}",
        f"{bench.read_share:.0%}",
        f"{speed.median:.2f}",
        f"{speed.lower_quartile:.2f} to {speed.upper_quartile:.2f}",
        f"{1 / bench.read_share:.2f}",
    )
    return table
