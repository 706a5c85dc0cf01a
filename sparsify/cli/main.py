"""The command line: parse, call, print."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from sparsify.cli.bench import bench_app
from sparsify.cli.bounds import (
    DENSITY,
    GATE_THRESHOLD,
    MEMORY_GB,
    PRICE,
    SHARE_BELOW_ONE,
    SHARE_INSIDE,
    THROUGHPUT,
    TOKENS,
    TOKENS_OR_NONE,
)
from sparsify.cli.evaluate import evaluate
from sparsify.cli.export import export_app
from sparsify.cli.generate import generate
from sparsify.cli.mixture import mixture_app
from sparsify.cli.options import (
    AsJson,
    Overrides,
    TrustCode,
    console,
    log_progress,
    print_line,
    print_result,
    status_line,
)
from sparsify.cli.predictors import predictors_app
from sparsify.cli.simulate import simulate
from sparsify.errors import UserError
from sparsify.launch.child import INTERRUPTED, Interrupted
from sparsify.metadata import user_path
from sparsify.models.activations import activation_names, alternatives
from sparsify.reporting.terminal import PlainConsole, plain

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn dense SwiGLU language models into activation-sparse ones: convert, continue pretraining, measure, export."
    "\n\n[bold]sparsify train quickstart[/bold] runs all steps in five minutes on a laptop.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The catalogue: list, show, copy, validate recipes.")
app.add_typer(recipes_app, name="recipes")
app.add_typer(mixture_app, name="mixture")
app.add_typer(predictors_app, name="predictors")
app.add_typer(export_app, name="export")
app.add_typer(bench_app, name="bench")
app.command()(evaluate)
app.command()(generate)
app.command()(simulate)

UNUSABLE_PATHS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ENXIO)
"""Errors of a path that was named; what is wrong with the disk is said where it is read or written."""


def main() -> None:
    """Entry point: exit code 0 done, 2 the user's mistake, 1 a defect of ours, 130 interrupted after a clean save."""
    # Progress bars of libraries would break ours; ranks inherit this.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    log_progress()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    try:
        _check_characters(sys.argv[1:])
        app()
    except OSError as error:
        if error.errno not in UNUSABLE_PATHS or error.filename is None:
            raise
        refused = UserError(f"{error.filename} cannot be used: {error.strerror}.", next_step="Give another path.")
        _print_error(refused)
        sys.exit(2)
    except UserError as error:
        _print_error(error)
        sys.exit(2)
    except Interrupted:
        print(
            "Interrupted; the state is saved. The same command continues from there.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    except _Interruption:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _print_error(error: UserError) -> None:
    PlainConsole(stderr=True, soft_wrap=True).print(Text("error", "bold red"), end=" ")
    print(plain(str(error)), file=sys.stderr)


def _check_characters(arguments: list[str]) -> None:
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(
                f"{argument.encode('utf-8', 'backslashreplace').decode()[:80]!r} is not UTF-8 text.",
                next_step="Type it again, or rename the file.",
            ) from error


class _Interruption(SystemExit):
    """Ctrl-C or SIGTERM. typer would end a KeyboardInterrupt without a word."""


def _interrupt(*_: object) -> None:
    """Ends a command: what it has half written and the processes that it started go with it."""
    raise _Interruption(INTERRUPTED)


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """Lists the recipes with a summary of each.

    Example: sparsify recipes list
    """
    from sparsify.recipe.catalogue import recipe_names, recipe_path, recipe_summary
    from sparsify.reporting.tables import Table

    rows = {name: recipe_summary(recipe_path(name)) for name in recipe_names()}
    if as_json:
        console.print_json(json.dumps(rows))
    else:
        cells = [[Text(name, "bold"), summary] for name, summary in rows.items()]
        console.print(Table("", None, cells, left=(0, 1)))


@recipes_app.command("show")
def recipes_show(recipe: str, overrides: Overrides = None) -> None:
    """Prints a recipe with all its settings, as it would run.

    Example: sparsify recipes show quickstart activation=reglu
    """
    from sparsify.recipe.compose import compose_recipe, to_yaml

    print(to_yaml(compose_recipe(recipe, overrides or [])), end="")


@recipes_app.command("copy")
def recipes_copy(recipe: str, to: Path) -> None:
    """Copies a recipe, to change the copy.

    Example: sparsify recipes copy quickstart my_recipe.yaml
    """
    from sparsify.recipe.catalogue import copy_recipe

    copy_recipe(recipe, to)
    print_line(f"{to}: change it, then `sparsify train {to}`")


@recipes_app.command("validate")
def recipes_validate(
    given: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE]... [KEY=VALUE]...", help="Names or paths, and overrides for all of them."),
    ] = None,
) -> None:
    """Composes and checks recipes; without names, all shipped ones.

    Example: sparsify recipes validate my_recipe.yaml mixture=my_mixture.yaml
    """
    from sparsify.evaluation.request import suite_code
    from sparsify.recipe.catalogue import recipe_names
    from sparsify.recipe.compose import compose_recipe

    overrides = [one for one in given or [] if "=" in one and not user_path(one).exists()]
    for name in [one for one in given or [] if one not in overrides] or recipe_names():
        code = suite_code(compose_recipe(name, overrides).eval)
        print_line(f"{name}: valid. {code}" if code else f"{name}: valid")


@app.command()
def plan(
    recipe: str,
    overrides: Overrides = None,
    hardware: Annotated[
        str | None,
        typer.Option(
            help="Devices as COUNTxGPU, with one process each: 8xh100-80gb, for example.",
            show_default="engine.planned_gpu, or this machine",
        ),
    ] = None,
    tokens_per_second: Annotated[
        float | None, typer.Option(callback=THROUGHPUT.check, help="Measured throughput of all processes together.")
    ] = None,
    gpu_hour_price: Annotated[
        float | None, typer.Option(callback=PRICE.check, help="Price of one device, in US dollars per hour.")
    ] = None,
    host_memory_gb: Annotated[
        float | None, typer.Option(callback=MEMORY_GB.check, help="Host memory of one node in GB, for offloading.")
    ] = None,
    chart: Annotated[
        Path | None,
        typer.Option("--chart", help="Path of a chart (.png or .svg) of the shares over the run."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Estimates what a recipe needs: memory by part, steps, epochs, disk, time, price, and whether it fits the hardware.

    Exits with 2 if the recipe does not fit. Memory is computed; time and price are estimates that options override.

    Example: sparsify plan turbosparse_mistral_7b engine=auto --hardware 8xh100-80gb --gpu-hour-price 2.2
    """
    from sparsify.commands.plan import Assumptions, refuse_unfit
    from sparsify.commands.plan import plan as plan_recipe
    from sparsify.plan import plan_table

    log_progress(quiet=as_json)
    given = Assumptions(hardware, tokens_per_second, gpu_hour_price, host_memory_gb)
    result = plan_recipe(recipe, overrides or [], given)
    if chart is not None:
        from sparsify.plan.chart import write_chart

        write_chart(result, chart)
    print_result(result.model_dump_json(), plan_table(result), as_json)
    refuse_unfit(result)


@app.command()
def convert(
    model: Annotated[str, typer.Argument(help="Checkpoint folder, Hub id, GGUF file or package:NAME/PATH")],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist.")],
    activation: Annotated[
        str | None,
        typer.Option(
            help=f"Activation to convert to: {alternatives(activation_names())}.",
            show_default="drelu; with a mask or sparse weights, the model's own",
        ),
    ] = None,
    gate_threshold: Annotated[
        float | None,
        typer.Option(
            callback=GATE_THRESHOLD.check,
            help="Gate threshold of an activation that has one: "
            f"{alternatives(activation_names(lambda row: row.has_gate_threshold))}.",
            show_default="the published one",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Method that makes the model sparse without training: a name of docs/methods.md.",
            show_default="with --calibrate-on, calibrated_replacement",
        ),
    ] = None,
    method_settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting of the method as KEY=VALUE; repeatable."),
    ] = None,
    refit: Annotated[
        bool | None,
        typer.Option(
            "--refit/--no-refit",
            help="Reconstruct the output matrices under the mask.",
            show_default="the method's own choice",
        ),
    ] = None,
    remainder: Annotated[
        str | None,
        typer.Option(
            help="What replaces the dropped elements: none, or constant, their mean.",
            show_default="none",
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="Zeros of each layer: uniform, or sensitivity, fewer where they cost more.",
            show_default="uniform",
        ),
    ] = None,
    calibrate_on: Annotated[
        str | None,
        typer.Option(
            help="Text or mixture to calibrate on.",
            show_default="with --method, quickstart",
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(callback=TOKENS.check, help="Calibration tokens.", show_default="131,072")
    ] = None,
    target_zeros: Annotated[
        float | None,
        typer.Option(
            callback=SHARE_BELOW_ONE.check,
            help="Share of exact zeros that the method's mask gives every layer, such as 0.9.",
        ),
    ] = None,
    target_density: Annotated[
        float | None,
        typer.Option(
            callback=DENSITY.check,
            help="Share of the weights of all linear projections that a token may read; the mask's zeros follow from it.",
        ),
    ] = None,
    weight_sparsity: Annotated[
        float | None,
        typer.Option(
            callback=SHARE_INSIDE.check,
            help="Share of the weights of every linear projection to set to zero, such as 0.5: of magnitude, wanda, sparsegpt.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Text or mixture to measure a conversion without calibration on.",
            show_default="quickstart",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(callback=TOKENS.check, help="Tokens to measure the activation replacement on.")
    ] = 8192,
    as_json: AsJson = False,
) -> None:
    """Converts a dense checkpoint to a sparse-activated one, and reports the change of its loss.

    Example: sparsify convert mistralai/Mistral-7B-v0.1 --calibrate-on my_text.jsonl.gz --to mistral-drelu
    """
    from sparsify.commands import convert as verb

    options = verb.ConvertOptions(
        activation,
        gate_threshold,
        method,
        method_settings or (),
        refit,
        remainder,
        allocation,
        calibrate_on,
        calibration_tokens,
        target_zeros,
        target_density,
        weight_sparsity,
        on,
    )
    chosen, settings, calibrate_on = verb.conversion_settings(model, options)
    if calibrate_on is None:
        result = verb.convert_model(model, chosen, to, on or "quickstart", tokens)
    else:
        result = verb.convert_model_calibrated(model, chosen, settings, to, calibrate_on, tokens)
    print_result(json.dumps(verb.replacement_record(result)), verb.replacement_table(result), as_json)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe name or path of a YAML file")],
    overrides: Overrides = None,
    multirun: Annotated[bool, typer.Option("-m", help="Train one run for each combination of key=a,b values.")] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe: conversion, training, its dense baseline, report, export. The same command resumes an interrupted run.

    Example: sparsify train quickstart mixture.instruction_token_share=0.3
    """
    from sparsify.bench.decode import time_export
    from sparsify.bench.decode_report import export_speed
    from sparsify.commands import train as verb
    from sparsify.recipe.compose import sweep

    points = sweep(overrides or []) if multirun else [overrides or []]
    if multirun:
        verb.check_sweep(recipe, points)
    for point in points:
        result = verb.train(recipe, point)
        if result is None:
            continue  # node 0 shows it
        with status_line() as on_progress:
            timed = time_export(result.run, on_progress)
        record = verb.run_record(result) | {"decoding": timed and timed.model_dump()}
        print_result(json.dumps(record), verb.run_summary(result, timed and export_speed(timed)), as_json)


@app.command()
def report(
    model_or_run: Annotated[str, typer.Argument(help="Model folder, Hub id, run folder or checkpoint")],
    on: Annotated[
        str | None,
        typer.Option("--on", help="Text file (plain, jsonl, gz) or mixture to measure on."),
    ] = None,
    tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Tokens to measure on.")] = 32_768,
    curve_tokens: Annotated[
        int,
        typer.Option(
            callback=TOKENS_OR_NONE.check, help="Number of these for CETT, perplexity and top-k curves; 0: no curves."
        ),
    ] = 2_048,
    against: Annotated[str | None, typer.Option("--against", help="Another model or run to compare with.")] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write.", show_default="RUN/report or reports/NAME"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measures a model's sparsity and its potential: zeros, CETT, unions, active parameters. Writes HTML, PNG, CSV, JSON.

    Works on a model of any family that can be held, converted or not.

    Example: sparsify report runs/quickstart --on my_text.txt.gz
    """
    from sparsify.commands.report import make_report
    from sparsify.sparsity.report import report_summary

    log_progress(quiet=as_json)
    result, folder = make_report(model_or_run, on, tokens, to, curve_tokens=curve_tokens, against=against)
    print_result(result.model_dump_json(), report_summary(result, folder), as_json)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders (a single one is compared with its baseline), or folders of `sparsify evaluate`."
        ),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write.", show_default="comparisons/NAME"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compares runs, or evaluations: loss by source or paired scores by task, gap to the dense baseline, zeros.

    Notes which numbers are not comparable, which differences are noise, and which gains lack a baseline. Writes HTML, PNG,
    CSV, JSON.

    Example: sparsify compare runs/quickstart runs/quickstart,activation=reglu
    """
    from sparsify.compare.write import compare as compare_paths

    result, summary = compare_paths(runs, to, " ".join(["sparsify", *sys.argv[1:]]))
    console.print_json(result.model_dump_json()) if as_json else console.print(summary)


@app.command()
def reproduce(
    bundle: Annotated[Path, typer.Argument(help="Folder that `sparsify export` wrote")],
    run: Annotated[bool, typer.Option("--run", help="Run the command, and compare.")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="Run folder.", show_default="reproductions/NAME")] = None,
    trust_code: TrustCode = False,
) -> None:
    """Prints the command that reproduces a bundle from its recipe; --run runs it and compares data and loss.

    Example: sparsify reproduce my-sparse-model
    """
    from sparsify.commands.reproduce import reproduce as run_again
    from sparsify.commands.reproduce import reproduction

    plan = reproduction(user_path(bundle), to)
    for difference in plan.differences:
        print_line(f"Note: {difference}.")
    print_line(plan.command)
    if run:
        for sentence in run_again(user_path(bundle), plan):
            print_line(sentence)
