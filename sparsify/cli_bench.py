"""`sparsify bench`: ratios against a named baseline, measured in one process."""

from __future__ import annotations

import json
from pathlib import Path
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


@bench_app.command("recovery")
def bench_recovery(
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the runs and the result.")] = Path(
        "recovery"
    ),
    arms: Annotated[
        str,
        typer.Option(help="Recipes of recipes/recovery/, such as drelu,reglu; all unless given."),
    ] = "",
    rates: Annotated[
        str, typer.Option(help="Peak learning rates that every arm chooses from.")
    ] = "1e-4,3e-4,1e-3",
    seeds: Annotated[str, typer.Option(help="The first one searches.")] = "1,2,3",
    as_json: AsJson = False,
) -> None:
    """What each way to sparsity costs against the dense control, on the same tokens, each with a rate of its own.

    Goes on where it was interrupted. Example: sparsify bench recovery --arms drelu,annealed_drelu training.budget_tokens=102400
    """
    from sparsify.benchmarks.recovery import RecoveryPlan, bench_recovery, numbers
    from sparsify.benchmarks.recovery_table import recovery_table, write_recovery

    plan = RecoveryPlan(
        to,
        [name.strip() for name in arms.split(",") if name.strip()],
        numbers("--rates", rates, float),
        numbers("--seeds", seeds, int),
        overrides or [],
    )
    result = bench_recovery(plan, Console(stderr=True, highlight=False).print)
    write_recovery(result, to)
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(recovery_table(result))
