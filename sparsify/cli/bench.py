"""`sparsify bench`: ratios against a named baseline, measured in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.bench_kernels import kernel_benches
from sparsify.cli.bounds import (
    BATCH,
    COUNT,
    DENSITY,
    LEARNING_RATE,
    REPEATS,
    SEED,
    SEQUENCE_LENGTH,
    TOKENS,
    TOKENS_OR_NONE,
)
from sparsify.cli.options import AsJson, Overrides, print_result, status_line
from sparsify.reporting.log_lines import error_console, print_log_lines

bench_app = typer.Typer(
    no_args_is_help=True,
    help="Benchmarks: ratios against a named baseline, measured in the same process.",
)
bench_app.add_typer(kernel_benches)


@bench_app.command("mixture")
def bench_mixture(
    on: Annotated[str, typer.Option("--on", help="Mixture: a name or a YAML file.")] = "quickstart",
    tokenizer: Annotated[
        str, typer.Option(help="Model folder or Hub id whose tokenizer both sides use.")
    ] = "package:sparsify/assets/quickstart_base",
    budget_tokens: Annotated[
        int, typer.Option(callback=TOKENS.check, help="Training budget to draw, in tokens.")
    ] = 2_000_000,
    sequence_length: Annotated[
        int, typer.Option(callback=SEQUENCE_LENGTH.check, help="Sequence length in tokens.")
    ] = 2048,
    buffer_documents: Annotated[
        int,
        typer.Option(
            callback=COUNT.check,
            help="Shuffle buffer of interleave_datasets; its own default of 1000 would hold all of a short run.",
        ),
    ] = 100,
    load_tokens: Annotated[
        int, typer.Option(callback=TOKENS.check, help="Tokens per repeat of loading from the cache.")
    ] = 8_000_000,
    repeats: Annotated[int, typer.Option(callback=REPEATS.check, help="Repeats of each timing.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Compares our data path with datasets.interleave_datasets on the same files: shares, resume, speed, memory.

    Example: sparsify bench mixture --on my_mixture.yaml --budget-tokens 10000000
    """
    from sparsify.bench import mixture_speed
    from sparsify.bench.mixture_report import mixture_table

    with status_line() as on_progress:
        result = mixture_speed.bench_mixture(
            on,
            tokenizer,
            budget_tokens=budget_tokens,
            sequence_length=sequence_length,
            buffer_documents=buffer_documents,
            load_tokens=load_tokens,
            repeats=repeats,
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), mixture_table(result), as_json)


@bench_app.command("train")
def bench_train(
    recipe: Annotated[str, typer.Argument(help="Recipe: a name or a YAML file.")] = "quickstart",
    overrides: Overrides = None,
    block_steps: Annotated[int, typer.Option(callback=REPEATS.check, help="Training steps per measured block.")] = 3,
    blocks: Annotated[int, typer.Option(callback=REPEATS.check, help="Measured blocks per loop.")] = 9,
    as_json: AsJson = False,
) -> None:
    """Compares our training loop with the bare DeepSpeed engine and transformers.Trainer; measures the cost of validation.

    Example: sparsify bench train quickstart engine=zero2 --blocks 15
    """
    from sparsify.bench import training_speed
    from sparsify.bench.training_report import training_table

    with status_line() as on_progress:
        result = training_speed.bench_train(
            recipe,
            overrides or [],
            block_steps=block_steps,
            blocks=blocks,
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), training_table(result), as_json)


@bench_app.command("recovery")
def bench_recovery(
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the runs and the result.")] = Path("recovery"),
    variants: Annotated[
        str,
        typer.Option(help="Recipes of recipes/recovery/, such as drelu,reglu.", show_default="all"),
    ] = "",
    rates: Annotated[
        str, typer.Option(help="Peak learning rates to search, for each variant.")
    ] = "3e-5,1e-4,3e-4,1e-3",
    seeds: Annotated[str, typer.Option(help="Seeds; the learning-rate search uses the first.")] = "1,2,3",
    as_json: AsJson = False,
) -> None:
    """Measures the loss of each way to sparsity against the dense baseline, on the same tokens, at its best learning rate.

    The same command resumes an interrupted benchmark.

    Example: sparsify bench recovery --variants drelu,blended_drelu training.budget_tokens=102400
    """
    from sparsify.bench.recovery import RecoveryPlan, bench_recovery
    from sparsify.bench.recovery_report import recovery_table, write_recovery

    plan = RecoveryPlan(
        to,
        [name.strip() for name in variants.split(",") if name.strip()],
        LEARNING_RATE.parse_list("--rates", rates),
        SEED.parse_list("--seeds", seeds),
        overrides or [],
    )
    print_log_lines(to=error_console)
    result = bench_recovery(plan)
    write_recovery(result, to)
    print_result(result.model_dump_json(), recovery_table(result), as_json)


@bench_app.command("proof")
def bench_proof(
    overrides: Overrides = None,
    to: Annotated[Path, typer.Option("--to", help="Folder of the runs and the result.")] = Path("proof"),
    variants: Annotated[
        str,
        typer.Option(help="Recipes of recipes/proof/, such as drelu,thresholded90_reglu.", show_default="all"),
    ] = "",
    rates: Annotated[str, typer.Option(help="Peak learning rates to search, for each variant.")] = "3e-5,1e-4,3e-4",
    search_tokens: Annotated[
        int, typer.Option(callback=TOKENS.check, help="Budget of each run of that search, in tokens.")
    ] = 102_400,
    seeds: Annotated[
        str, typer.Option(help="Seeds; those after the first only for the three variants with the lowest loss.")
    ] = "1,2",
    as_json: AsJson = False,
) -> None:
    """Trains SmolLM2-135M's variants and its dense baseline on the same tokens; measures losses, tasks, zeros and decoding speed.

    It takes days on a CPU. The same command resumes; what is known is in proof.json after every run.

    Example: sparsify bench proof mixture=my_mixture.yaml eval.suite_data_dir=my_evaluation_data
    """
    from sparsify.bench.proof import bench_proof as run
    from sparsify.bench.proof import proof_plan
    from sparsify.bench.proof_report import proof_table, write_proof
    from sparsify.bench.recovery import RecoveryPlan

    plan = RecoveryPlan(
        to,
        [name.strip() for name in variants.split(",") if name.strip()],
        LEARNING_RATE.parse_list("--rates", rates),
        SEED.parse_list("--seeds", seeds),
        overrides or [],
        search_tokens=search_tokens,
    )
    print_log_lines(to=error_console)
    result = run(proof_plan(plan), lambda found: write_proof(found, to))
    print_result(result.model_dump_json(), proof_table(result), as_json)


@bench_app.command("spikes")
def bench_spikes(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs that were trained; all of their steps count as healthy."),
    ] = None,
    steps: Annotated[int, typer.Option(callback=COUNT.check, help="Steps of each synthetic run.")] = 10_000,
    batches: Annotated[str, typer.Option(help="Sequences a step of the synthetic runs.")] = "1,8,64,512,2048",
    seed: Annotated[int, typer.Option(callback=SEED.check, help="Seed of the synthetic runs.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Counts the false alarms of the spike rule on healthy runs, and what it finds of planted spikes and divergence.

    Example: sparsify bench spikes --steps 4000 --batches 1,64
    """
    from sparsify.bench.spikes import bench_spikes, spikes_table

    result = bench_spikes(steps, BATCH.parse_list("--batches", batches), runs or [], seed)
    print_result(result.model_dump_json(), spikes_table(result), as_json)


@bench_app.command("methods")
def bench_methods(
    model: Annotated[str, typer.Argument(help="Dense model: folder, Hub id or GGUF file.")],
    on: Annotated[str, typer.Option("--on", help="Text or mixture to calibrate and to measure on.")] = "quickstart",
    to: Annotated[Path, typer.Option("--to", help="Folder of the result.")] = Path("methods"),
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Masks of docs/methods.md, comma-separated, each NAME or NAME:KEY=VALUE, such as percentile:site=gate or teal:conversion.remainder=constant.",
            show_default="all",
        ),
    ] = "",
    densities: Annotated[
        str, typer.Option(help="Shares of the weights of all linear projections that a token may read.")
    ] = "0.7,0.5,0.4,0.3,0.2,0.1",
    refit: Annotated[
        bool, typer.Option("--refit", help="Measure each with the output matrix reconstructed under the mask, too.")
    ] = False,
    calibration_tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Calibration tokens.")] = 32_768,
    tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Held-out tokens to measure on.")] = 32_768,
    sequence_length: Annotated[int, typer.Option(callback=SEQUENCE_LENGTH.check, help="Tokens of a sequence.")] = 512,
    decode_tokens: Annotated[
        int, typer.Option(callback=TOKENS_OR_NONE.check, help="Tokens of a timed decoding; 0: none is timed.")
    ] = 32,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep the converted models in the folder, so that they can be timed later.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compares all masks on one model at equal weight densities: loss against dense, zeros, decoding speed.

    The same command resumes an interrupted benchmark; more methods or densities are added to it, and speeds that are missing.

    Example: sparsify bench methods my_model --on my_text.txt --methods cats,chess --densities 0.7,0.5 --refit
    """
    from sparsify.bench.method_comparison import MethodsPlan
    from sparsify.bench.method_comparison import bench_methods as run
    from sparsify.bench.method_comparison_report import methods_table, write_methods

    plan = MethodsPlan(
        model=model,
        on=on,
        to=to,
        methods=[name.strip() for name in methods.split(",") if name.strip()],
        densities=DENSITY.parse_list("--densities", densities),
        refit=refit,
        calibration_tokens=calibration_tokens,
        tokens=tokens,
        sequence_length=sequence_length,
        decode_tokens=decode_tokens,
        keep=keep,
    )
    print_log_lines(to=error_console)
    result = run(plan)
    write_methods(result, to)
    print_result(result.model_dump_json(), methods_table(result), as_json)


@bench_app.command("quantisation")
def bench_quantisation(
    models: Annotated[
        list[str], typer.Argument(help="Folders or Hub ids of models; the others are compared with the first.")
    ],
    on: Annotated[str, typer.Option("--on", help="Text or mixture to measure on.")] = "quickstart",
    tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Tokens that are computed at once.")] = 16_384,
    sequence_length: Annotated[int, typer.Option(callback=SEQUENCE_LENGTH.check, help="Tokens of a sequence.")] = 512,
    decode_sequences: Annotated[
        int, typer.Option(callback=COUNT.check, help="Sequences that are decoded token by token.")
    ] = 16,
    decode_length: Annotated[
        int, typer.Option(callback=SEQUENCE_LENGTH.check, help="Tokens of each that are decoded: its first ones.")
    ] = 128,
    as_json: AsJson = False,
) -> None:
    """Compares quantised models with the one that they were made from: losses of whole sequences and of decoding, zeros, bytes.

    Example: sparsify bench quantisation my_dense my_rtn my_rrs
    """
    from sparsify.bench.quantisation import bench_quantisation as run
    from sparsify.bench.quantisation import quantisation_table
    from sparsify.recipe.recipe import CACHE_DIR

    with status_line() as on_progress:
        result = run(
            models,
            on=on,
            num_tokens=tokens,
            sequence_length=sequence_length,
            decode_sequences=decode_sequences,
            decode_length=decode_length,
            cache_dir=Path(CACHE_DIR).expanduser(),
            on_progress=on_progress,
        )
    print_result(result.model_dump_json(), quantisation_table(result), as_json)
