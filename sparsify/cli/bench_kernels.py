"""`sparsify bench` of kernels and of decoding: seconds against a named baseline, measured in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.bounds import (
    BATCH,
    COUNT,
    DENSITY,
    LAYERS_OR_NONE,
    NEW_TOKENS,
    REPEATS,
    SHARE,
    SHARE_INSIDE,
    THREADS,
    TOKENS,
    WIDTH,
)
from sparsify.cli.options import AsJson, print_result, status_line
from sparsify.models.activations import activation_names, alternatives

kernel_benches = typer.Typer()


@kernel_benches.command("decode")
def bench_decode(
    bundle: Annotated[
        str | None,
        typer.Option(help="Bundle, model or run whose speed-up is measured, in total and by layer."),
    ] = None,
    predictors: Annotated[
        Path | None,
        typer.Option(help="Predictors of the bundle, measured in addition to exact decoding."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Prompt of the bundle's decoding.")] = "def read_json(path):\n",
    tokens: Annotated[int, typer.Option(callback=NEW_TOKENS.check, help="Tokens to decode, one by one.")] = 24,
    hidden: Annotated[int, typer.Option(callback=WIDTH.check, help="Width of the block.")] = 4096,
    neurons: Annotated[int, typer.Option(callback=WIDTH.check, help="Neurons of the block.")] = 14_336,
    rank: Annotated[
        int | None,
        typer.Option(callback=WIDTH.check, help="Rank of the predictors.", show_default="a quarter of the hidden size"),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Device: cpu or cuda.", show_default="cuda if there is a GPU with Triton"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Type of the weights: fp32, bf16 or fp16.")] = "bf16",
    weights: Annotated[
        str,
        typer.Option(help="Weight format of the C++ kernels: stored, int8 or int4. torch's operators use --dtype."),
    ] = "stored",
    sparsity: Annotated[
        str, typer.Option(help="Shares of zeros, comma-separated; empty: no blocks.")
    ] = "0.5,0.7,0.8,0.9,0.95,0.97",
    batch: Annotated[str, typer.Option(help="Batch sizes at 90% zeros, comma-separated.")] = "1,2,4,8,16,32",
    threads: Annotated[
        str | None,
        typer.Option(help="Numbers of threads, comma-separated.", show_default="1 and torch's own"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of a model with random weights: mistral-7b, mixtral-8x7b, llama-3.2-1b or smollm2-135m.",
            show_default="mistral-7b",
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            callback=LAYERS_OR_NONE.check,
            help="Layers of that model; 0: no such model.",
            show_default="4 and 1 of the 7B shapes, all of the others",
        ),
    ] = None,
    weight_sparsity: Annotated[
        float | None,
        typer.Option(
            callback=SHARE_INSIDE.check,
            help="Share of the weights of that model's projections that are zero: decoded with and without them.",
        ),
    ] = None,
    gates: Annotated[
        float | None,
        typer.Option(
            callback=SHARE.check,
            help="Share of that model's gates that are positive; 10% of its neurons fire.",
            show_default="0.1: the gate alone decides",
        ),
    ] = None,
    together: Annotated[
        str,
        typer.Option(help="Measure, instead of that model, the steps that verify so many tokens, such as 2,4,8."),
    ] = "",
    overlap: Annotated[
        str,
        typer.Option(help="Shares of the firing neurons that tokens of --together have in common, comma-separated."),
    ] = "0,0.5",
    llamacpp: Annotated[
        bool, typer.Option(help="Measure models in llama.cpp, too, if llama-cpp-python is installed (CPU only).")
    ] = True,
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Repeats of each timing.")] = 9,
    plot: Annotated[Path | None, typer.Option(help="Path of a chart (.png or .svg) of speed-up against zeros.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compares dense and sparse decoding with the same weights in one process: one block, and a whole model.

    Example: sparsify bench decode --bundle my-sparse-model --sparsity ""
    """
    import torch

    from sparsify.bench.decode import DecodeSettings, devices
    from sparsify.bench.decode import bench_decode as run
    from sparsify.bench.decode_report import check_figure, decode_table, write_figure

    device = device or devices()[-1]
    own = sorted({1, torch.get_num_threads()}) if device == "cpu" else [torch.get_num_threads()]
    settings = DecodeSettings(
        hidden=hidden,
        neurons=neurons,
        rank=rank,
        device=device,
        dtype=dtype,
        weights=weights,
        sparsities=tuple(SHARE.parse_list("--sparsity", sparsity)),
        batches=tuple(BATCH.parse_list("--batch", batch)),
        threads=tuple(own if threads is None else THREADS.parse_list("--threads", threads)),
        repeats=repeats,
        shape=shape,
        layers=layers,
        weight_sparsity=weight_sparsity,
        gates=gates,
        together=tuple(BATCH.parse_list("--together", together)),
        overlaps=tuple(SHARE.parse_list("--overlap", overlap)),
        bundle=bundle,
        predictors=predictors,
        prompt=prompt,
        decode_tokens=tokens,
        llamacpp=llamacpp,
    )
    if plot is not None:
        check_figure(plot, settings.sparsities)
    with status_line() as on_progress:
        result = run(settings, on_progress)
    if plot is not None:
        write_figure(result, plot)
    print_result(result.model_dump_json(), decode_table(result), as_json)


@kernel_benches.command("activation")
def bench_activation(
    activation: Annotated[
        str,
        typer.Option(
            help=f"Activation to measure: {alternatives(activation_names(lambda row: row.has_training_kernel))}."
        ),
    ] = "drelu",
    tokens: Annotated[int, typer.Option(callback=NEW_TOKENS.check, help="Rows of the pre-activations.")] = 4096,
    neurons: Annotated[int, typer.Option(callback=WIDTH.check, help="Columns: neurons of a layer.")] = 14_336,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Measured rounds.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Compares the fused activation with eager torch and a plain copy: forward, and forward with backward.

    Example: sparsify bench activation --dtype fp32
    """
    from sparsify.bench import activation_speed as bench

    with status_line() as on_progress:
        result = bench.bench_activation(
            activation,
            tokens=tokens,
            neurons=neurons,
            dtype=dtype,
            repeats=repeats,
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), bench.activation_table(result), as_json)


@kernel_benches.command("groups")
def bench_groups(
    weights: Annotated[str, typer.Option(help="fp32, bf16 or fp16, or blocks: int8 or int4.")] = "bf16",
    active: Annotated[
        float, typer.Option(callback=DENSITY.check, help="Share of the groups that the router keeps.")
    ] = 0.5,
    group_size: Annotated[int, typer.Option(callback=WIDTH.check, help="Neighbouring neurons in one group.")] = 32,
    hidden: Annotated[int, typer.Option(callback=WIDTH.check, help="Width of the block.")] = 4096,
    neurons: Annotated[int, typer.Option(callback=WIDTH.check, help="Neurons of the block.")] = 14_336,
    threads: Annotated[int, typer.Option(callback=THREADS.check, help="Threads of the kernels.")] = 2,
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Measured rounds.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Compares reading whole groups of neurons of a feed-forward block with as many scattered ones, and with the dense block, for one
    token.

    Example: sparsify bench groups --weights int8 --active 0.3
    """
    from sparsify.bench import group_speed as bench

    with status_line() as on_progress:
        result = bench.bench_groups(
            weights,
            active_share=active,
            group_size=group_size,
            hidden=hidden,
            neurons=neurons,
            threads=threads,
            repeats=repeats,
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), bench.groups_table(result), as_json)


@kernel_benches.command("columns")
def bench_columns(
    weights: Annotated[str, typer.Option(help="fp32, bf16 or fp16, or blocks: int8 or int4.")] = "bf16",
    kept: Annotated[
        float, typer.Option(callback=DENSITY.check, help="Share of the elements of each input that its mask keeps.")
    ] = 0.5,
    hidden: Annotated[int, typer.Option(callback=WIDTH.check, help="Width of the block.")] = 4096,
    neurons: Annotated[int, typer.Option(callback=WIDTH.check, help="Neurons of the block.")] = 14_336,
    threads: Annotated[int, typer.Option(callback=THREADS.check, help="Threads of the kernels.")] = 2,
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Measured pairs.")] = 30,
    as_json: AsJson = False,
) -> None:
    """Compares a feed-forward block whose masked inputs are read by columns with the dense C++ kernel, for one token.

    Example: sparsify bench columns --weights int8 --kept 0.3
    """
    from sparsify.bench import column_speed as bench

    with status_line() as on_progress:
        result = bench.bench_columns(
            weights,
            kept_share=kept,
            hidden=hidden,
            neurons=neurons,
            threads=threads,
            repeats=repeats,
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), bench.columns_table(result), as_json)


@kernel_benches.command("integers")
def bench_integers(
    hidden: Annotated[int, typer.Option(callback=WIDTH.check, help="Width of the block.")] = 4096,
    neurons: Annotated[str, typer.Option(help="Neurons of the block, one or more numbers.")] = "14336,4096",
    tokens: Annotated[str, typer.Option(help="Tokens of a call: few of decoding, many of a prompt.")] = "1,8,256",
    threads: Annotated[int, typer.Option(callback=THREADS.check, help="Threads of the kernels.")] = 2,
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Measured rounds.")] = 15,
    as_json: AsJson = False,
) -> None:
    """Compares the products of a feed-forward block in integers of 4 and 8 bits with int4 blocks, torch's bf16, and reading the weights alone.

    Example: sparsify bench integers --neurons 4096 --tokens 1,8
    """
    from sparsify.bench import integer_speed as bench

    widths, counts = WIDTH.parse_list("--neurons", neurons), TOKENS.parse_list("--tokens", tokens)
    with status_line() as on_progress:
        result = bench.bench_integers(hidden, widths, counts, threads, repeats, on_progress)
    print_result(result.model_dump_json(), bench.integers_table(result), as_json)


@kernel_benches.command("offload")
def bench_offload(
    to: Annotated[
        Path, typer.Option("--to", help="Folder of the model and its neuron files: about 4 times --share of a disk.")
    ],
    shape: Annotated[str, typer.Option(help="mistral-7b, mixtral-8x7b, llama-3.2-1b or smollm2-135m.")] = "mistral-7b",
    layers: Annotated[int, typer.Option(callback=COUNT.check, help="Layers.")] = 8,
    share: Annotated[
        float, typer.Option(callback=DENSITY.check, help="Memory for neurons as a share of all of them.")
    ] = 0.25,
    limit: Annotated[
        float | None,
        typer.Option(
            callback=DENSITY.check,
            help="In place of --share: memory for everything, Python and torch included, as a share of the model.",
        ),
    ] = None,
    active: Annotated[float, typer.Option(callback=DENSITY.check, help="Share of the neurons that fire.")] = 0.1,
    skew: Annotated[
        float,
        typer.Option(
            callback=SHARE.check,
            help="How unequally: 0 all alike; above, the n-th most likely neuron has the weight n to the power of -skew.",
        ),
    ] = 0.0,
    rank: Annotated[int, typer.Option(callback=WIDTH.check, help="Rank of the predictors.")] = 512,
    warm_tokens: Annotated[int, typer.Option(callback=COUNT.check, help="Tokens before those that are measured.")] = 3,
    tokens: Annotated[int, typer.Option(callback=NEW_TOKENS.check, help="Measured tokens of a round.")] = 4,
    rounds: Annotated[int, typer.Option(callback=REPEATS.check, help="Rounds of all ways.")] = 3,
    threads: Annotated[int, typer.Option(callback=THREADS.check, help="Threads of the kernels.")] = 2,
    only: Annotated[str, typer.Option(help="Ways to measure, separated by semicolons.", show_default="all")] = "",
    plot: Annotated[Path | None, typer.Option(help="Path of a chart (.png or .svg) of tokens per second.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compares ways of decoding a model whose neurons do not fit into memory: dense streaming, mmap, and caches of neurons.

    Example: sparsify bench offload --to /tmp/offload --shape mixtral-8x7b --layers 4
    """
    from sparsify.bench import offload as bench
    from sparsify.bench import offload_report as report
    from sparsify.bench.offload_model import Firing

    if plot is not None:
        report.check_plot(plot)
    names = tuple(one.strip() for one in only.split(";") if one.strip())
    plan = bench.OffloadPlan(
        to, shape, layers, Firing(active, skew), share, rank, warm_tokens, tokens, rounds, threads, names, limit
    )
    with status_line() as on_progress:
        result = bench.bench_offload(plan, on_progress)
    if plot is not None:
        report.write_plot(result, plot)
    print_result(result.model_dump_json(), report.offload_table(result), as_json)
