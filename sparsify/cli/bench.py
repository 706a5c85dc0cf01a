"""`sparsify bench`: ratios against a named baseline, measured in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.bounds import (
    BATCH,
    COUNT,
    DENSITY,
    LAYERS_OR_NONE,
    LEARNING_RATE,
    NEW_TOKENS,
    REPEATS,
    SEED,
    SEQUENCE_LENGTH,
    SHARE,
    SHARE_INSIDE,
    THREADS,
    TOKENS,
    TOKENS_OR_NONE,
    WIDTH,
)
from sparsify.cli.options import AsJson, Overrides, print_result, status_line
from sparsify.models.activations import activation_names, alternatives
from sparsify.reporting.log_lines import error_console, print_log_lines

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


@bench_app.command("decode")
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


@bench_app.command("activation")
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


@bench_app.command("groups")
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


@bench_app.command("columns")
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


@bench_app.command("integers")
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


@bench_app.command("offload")
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
