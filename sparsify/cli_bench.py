"""`sparsify bench`: ratios against a named baseline, measured in one process."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from sparsify.cli_common import AsJson, Overrides, console

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Benchmarks: ratios against a named baseline, measured in the same process.",
)


@bench_app.command("mixture")
def bench_mixture(
    on: Annotated[str, typer.Option("--on", help="Mixture: a name or a YAML file.")] = "quickstart",
    tokenizer: Annotated[
        str, typer.Option(help="Model folder or Hub id whose tokenizer both sides use.")
    ] = "package:sparsify/assets/quickstart_base",
    budget_tokens: Annotated[
        int, typer.Option(help="Tokens of the run that is drawn.")
    ] = 2_000_000,
    window_tokens: Annotated[int, typer.Option(help="Tokens of a window.")] = 2048,
    buffer_documents: Annotated[
        int,
        typer.Option(
            help="Shuffle buffer of interleave_datasets. Its default of 1000 holds all of a short run."
        ),
    ] = 100,
    load_tokens: Annotated[
        int, typer.Option(help="Tokens of one repeat of loading from the cache.")
    ] = 8_000_000,
    repeats: Annotated[int, typer.Option(help="Repeats of every time.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Our data path beside datasets.interleave_datasets on the same files: shares, resume, speed, memory.

    Example: sparsify bench mixture --on my_mixture.yaml --budget-tokens 10000000
    """
    from sparsify.benchmarks import mixture
    from sparsify.benchmarks.mixture_table import mixture_table

    with Console(stderr=True).status("") as status:
        result = mixture.bench_mixture(
            on,
            tokenizer,
            budget_tokens=budget_tokens,
            window_tokens=window_tokens,
            buffer_documents=buffer_documents,
            load_tokens=load_tokens,
            repeats=repeats,
            say=status.update,
        )
    console.print_json(result.model_dump_json()) if as_json else console.print(
        mixture_table(result)
    )


@bench_app.command("memory")
def bench_memory(
    few: Annotated[
        bool, typer.Option("--few", help="Only the two trials that a test has.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The memory that `plan` predicts beside the measured peak, over ZeRO stages, precisions, processes and batches.

    Example: sparsify bench memory
    """
    from sparsify.benchmarks import memory_grid

    with Console(stderr=True).status("") as status:
        trials = memory_grid.FEW if few else memory_grid.GRID
        results = memory_grid.bench_memory(trials, status.update)
    if as_json:
        console.print_json(json.dumps([one.model_dump() for one in results]))
    else:
        console.print(memory_grid.memory_table(results))


@bench_app.command("train")
def bench_train(
    recipe: Annotated[str, typer.Argument(help="Recipe: a name or a YAML file.")] = "quickstart",
    overrides: Overrides = None,
    block_steps: Annotated[int, typer.Option(help="Training steps of one measured block.")] = 3,
    blocks: Annotated[int, typer.Option(help="Measured blocks of each loop.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Our training loop beside the bare DeepSpeed engine and beside transformers.Trainer; what validation costs.

    Example: sparsify bench train quickstart engine=zero2 --blocks 15
    """
    from sparsify.benchmarks import training
    from sparsify.benchmarks.training_table import training_table

    with Console(stderr=True).status("") as status:
        result = training.bench_train(
            recipe, overrides or [], block_steps=block_steps, blocks=blocks, say=status.update
        )
    console.print_json(result.model_dump_json()) if as_json else console.print(
        training_table(result)
    )


@bench_app.command("activation")
def bench_activation(
    activation: Annotated[str, typer.Option(help="Activation: drelu, reglu or swiglu.")] = "drelu",
    tokens: Annotated[int, typer.Option(help="Rows of the pre-activations.")] = 4096,
    neurons: Annotated[int, typer.Option(help="Columns: a layer's neurons.")] = 14_336,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    repeats: Annotated[int, typer.Option(help="Measured rounds.")] = 15,
    as_json: AsJson = False,
) -> None:
    """The fused activation beside eager torch and a plain copy: forward, and forward with backward.

    Example: sparsify bench activation --dtype fp32
    """
    from sparsify.benchmarks import activation as bench

    with Console(stderr=True).status("") as status:
        result = bench.bench_activation(
            activation,
            tokens=tokens,
            neurons=neurons,
            dtype=dtype,
            repeats=repeats,
            say=status.update,
        )
    console.print_json(result.model_dump_json()) if as_json else console.print(
        bench.activation_table(result)
    )
