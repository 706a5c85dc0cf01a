"""The command line: parse, call, print. `sparsify` alone and every verb with --help teach by example."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify.errors import UserError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Turn dense SwiGLU language models into activation-sparse ones: convert, continue pretraining, measure, export."
    "\n\n[bold]sparsify train quickstart[/bold] shows the whole way in five minutes on a laptop.",
)
recipes_app = typer.Typer(
    no_args_is_help=True, help="The catalogue: list, show, copy, validate recipes."
)
app.add_typer(recipes_app, name="recipes")
mixture_app = typer.Typer(
    no_args_is_help=True,
    help="Mixtures: look at what training would draw, count it, find better ratios.",
)
app.add_typer(mixture_app, name="mixture")
bench_app = typer.Typer(
    no_args_is_help=True,
    help="Benchmarks: ratios against a named baseline, measured in the same process.",
)
app.add_typer(bench_app, name="bench")
console = Console(highlight=False, soft_wrap=True)

INTERRUPTED = 130
DEFAULT_TOKENIZER = "package:sparsify/assets/quickstart_base"

Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings as key=value, for example training.budget_tokens=1_000_000"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def main() -> None:
    """Entry point: exit code 0 done, 2 the user's mistake, 1 a defect of ours, 130 interrupted after a clean save."""
    # Bars of libraries would break our own; ranks inherit this.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from sparsify.training.launcher import Interrupted

    try:
        app()
    except UserError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            "[bold red]error[/bold red]", end=" "
        )
        print(error, file=sys.stderr)
        sys.exit(2)
    except Interrupted:
        print(
            "Interrupted; the state is saved. The same command goes on from there.", file=sys.stderr
        )
        sys.exit(INTERRUPTED)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _say(line: str) -> None:
    console.print(line, markup=False)


def _quiet(_line: str) -> None: ...


@recipes_app.command("list")
def recipes_list(as_json: AsJson = False) -> None:
    """Lists the recipes with what each is for.

    Example: sparsify recipes list
    """
    from sparsify import catalogue, display

    rows = {
        name: catalogue.recipe_summary(catalogue.recipe_path(name))
        for name in catalogue.recipe_names()
    }
    console.print_json(json.dumps(rows)) if as_json else console.print(display.recipes_table(rows))


@recipes_app.command("show")
def recipes_show(recipe: str, overrides: Overrides = None) -> None:
    """Prints a recipe with all its settings, as it would run.

    Example: sparsify recipes show quickstart activation=reglu
    """
    from omegaconf import OmegaConf

    from sparsify import catalogue

    print(
        OmegaConf.to_yaml(OmegaConf.structured(catalogue.compose_recipe(recipe, overrides or []))),
        end="",
    )


@recipes_app.command("copy")
def recipes_copy(recipe: str, to: Path) -> None:
    """Copies a recipe, to make it your own.

    Example: sparsify recipes copy quickstart my_recipe.yaml
    """
    from sparsify import catalogue

    catalogue.copy_recipe(recipe, to)
    _say(f"{to}: change it, then `sparsify train {to}`")


@recipes_app.command("validate")
def recipes_validate(paths: Annotated[list[str] | None, typer.Argument()] = None) -> None:
    """Composes and checks recipes; all shipped ones unless some are given.

    Example: sparsify recipes validate my_recipe.yaml
    """
    from sparsify import catalogue

    for name in paths or catalogue.recipe_names():
        catalogue.compose_recipe(name)
        _say(f"{name}: valid")


Tokenizer = Annotated[
    str,
    typer.Option("--tokenizer", help="Model folder, Hub id or package:NAME/PATH it comes from."),
]
WindowTokens = Annotated[int, typer.Option("--window-tokens", help="Length of a window.")]


@mixture_app.command("preview")
def mixture_preview(
    mixture: Annotated[str, typer.Argument(help="Mixture name or path of a YAML file")],
    windows: Annotated[int, typer.Option("--windows", help="Windows of each source.")] = 1,
    window_tokens: WindowTokens = 256,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> None:
    """Shows real training windows of every source: where documents meet, which tokens carry loss.

    Example: sparsify mixture preview quickstart --windows 2
    """
    from sparsify import display
    from sparsify.verbs.mixture import preview

    for window in preview(mixture, tokenizer, windows, window_tokens, _say):
        console.print(display.window_preview(window))


@mixture_app.command("stats")
def mixture_stats(
    mixture: Annotated[str, typer.Argument(help="Mixture name or path of a YAML file")],
    budget_tokens: Annotated[
        int, typer.Option("--budget-tokens", help="Training tokens to look at.")
    ] = 1_000_000,
    window_tokens: WindowTokens = 2048,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
    as_json: AsJson = False,
) -> None:
    """Counts a mixture: documents, tokens, tokens per document, packing efficiency, epochs at a budget.

    Example: sparsify mixture stats quickstart --budget-tokens 10000000
    """
    from sparsify import display
    from sparsify.verbs.mixture import stats

    say = _quiet if as_json else _say
    result = stats(mixture, tokenizer, budget_tokens, window_tokens, say)
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(display.mixture_table(result))


@app.command()
def plan(
    recipe: str,
    overrides: Overrides = None,
    chart: Annotated[
        Path | None,
        typer.Option("--chart", help="Draw the shares over the run into this .png file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Says what a recipe needs before it costs anything: memory per process, steps, tokens per source, disk.

    Example: sparsify plan turbosparse_mistral_7b launch.processes=8 --chart shares.png
    """
    from sparsify import catalogue
    from sparsify.plan import make_plan, plan_table, write_chart

    composed = catalogue.compose_recipe(recipe, overrides or [])
    result = make_plan(composed)
    if chart is not None:
        write_chart(composed, chart)
    console.print_json(result.model_dump_json()) if as_json else console.print(plan_table(result))


@app.command()
def convert(
    model: Annotated[
        str, typer.Argument(help="Checkpoint folder, Hub id, GGUF file or package:NAME/PATH")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist.")],
    activation: Annotated[str, typer.Option(help="swiglu, reglu or drelu")] = "drelu",
    on: Annotated[
        str, typer.Option("--on", help="Text or mixture to measure the swap on.")
    ] = "quickstart",
    tokens: Annotated[int, typer.Option(help="Tokens to measure the swap on.")] = 8192,
    as_json: AsJson = False,
) -> None:
    """Writes a dense checkpoint as a sparse-activated one, and says what the swap did to its loss.

    Example: sparsify convert mistralai/Mistral-7B-v0.1 --activation drelu --to mistral-drelu
    """
    from sparsify import display
    from sparsify.verbs.convert import convert_model

    swap = convert_model(model, activation, to, on, tokens)
    if as_json:
        console.print_json(json.dumps(display.swap_record(swap)))
    else:
        console.print(display.swap_table(swap))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="Recipe name or path of a YAML file")],
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("-m", help="One run for each combination of key=a,b values.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Runs a recipe to its end: conversion, training, its dense control, report, export. Goes on where it stopped.

    Example: sparsify train quickstart mixture.instruction_token_share=0.3
    """
    from sparsify import catalogue, display
    from sparsify.verbs.train import train as run_recipe

    for choice in catalogue.sweep(overrides or []) if multirun else [overrides or []]:
        result = run_recipe(recipe, choice, _say)
        if as_json:
            console.print_json(json.dumps(display.run_record(result)))
        else:
            console.print(display.run_summary(result))


@mixture_app.command("tune")
def mixture_tune(
    recipe: Annotated[str, typer.Argument(help="Recipe name or path of a YAML file")],
    over: Annotated[
        list[str],
        typer.Option(
            help="What to vary: mixture.instruction_token_share=0:0.4, token_shares, or SOURCE=0.2:0.8; repeatable."
        ),
    ],
    trials: Annotated[int, typer.Option(help="Proxy runs; the first is the recipe's mixture.")],
    trial_tokens: Annotated[int, typer.Option(help="Training tokens of each proxy run.")],
    overrides: Overrides = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="DOMAIN=FACTOR: it counts FACTOR times its share in the mixture."),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="YAML file of the mixture.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the mixture even if the data do not support it.")
    ] = False,
    confirm: Annotated[
        bool, typer.Option("--confirm", help="Train both mixtures once more with another seed.")
    ] = False,
    confirm_tokens: Annotated[
        int | None, typer.Option(help="Tokens of those two runs; those of a trial unless given.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Finds a better mixture ratio: short proxy runs, a regression with its uncertainty, and a new mixture file.

    Says so when the trials do not support a choice. The same command goes on where it stopped.

    Example: sparsify mixture tune quickstart --over token_shares --trials 8 --trial-tokens 40960 --confirm
    """
    from sparsify.tuning.table import tune_summary
    from sparsify.tuning.tune import Request, tune

    request = Request(
        recipe,
        overrides or [],
        over,
        weight or [],
        trials,
        trial_tokens,
        to,
        force,
        confirm or confirm_tokens is not None,
        confirm_tokens,
    )
    found, folder = tune(request, _say)
    if as_json:
        console.print_json(found.model_dump_json())
    else:
        console.print(tune_summary(found, folder, recipe))


@app.command()
def report(
    model_or_run: Annotated[
        str, typer.Argument(help="Model folder, Hub id, run folder or checkpoint")
    ],
    on: Annotated[
        str | None, typer.Option("--on", help="Text file (plain, jsonl, gz) or mixture.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to measure on.")] = 32_768,
    to: Annotated[Path | None, typer.Option("--to", help="Folder of the report.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measures where a model is sparse: exact zeros by layer and expert, dead neurons, loss. HTML, PNG, CSV, JSON.

    Works on any Mistral, Mixtral or Llama folder, before any conversion too.

    Example: sparsify report runs/quickstart --on my_text.txt.gz
    """
    from sparsify import display
    from sparsify.verbs.report import make_report

    say = _quiet if as_json else _say
    result, folder = make_report(model_or_run, on, tokens, to, say)
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(display.report_summary(result, folder))


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; one alone is compared with its control."),
    ],
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write; comparisons/NAME unless given."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Puts runs side by side: what differs, loss by source, gap to the dense control, zeros, speed. HTML, PNG, CSV, JSON.

    Says which losses may be compared with each other, and why others may not.

    Example: sparsify compare runs/quickstart runs/quickstart,activation=reglu
    """
    from sparsify import comparison

    if to is not None:
        comparison.check_folder(to)
    result = comparison.compare(runs)
    result.command = " ".join(["sparsify", *sys.argv[1:]])
    folder = to or comparison.default_folder(result)
    comparison.write_comparison(result, folder)
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(comparison.comparison_summary(result, folder))


@app.command()
def export(
    run_or_checkpoint: Annotated[
        Path, typer.Argument(help="Run folder, or one checkpoint of a run")
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist.")],
) -> None:
    """Writes a bundle that loads with transformers alone, after checking it in a fresh offline process.

    Example: sparsify export runs/quickstart --to my-sparse-model
    """
    from sparsify.export.bundle import export as write_bundle

    bundle = write_bundle(run_or_checkpoint.expanduser(), to)
    _say(f"{bundle.folder}: {bundle.num_files} files, {bundle.size_bytes / 1e6:.1f} MB")
    _say(f"Checked: {bundle.acceptance.sentence()}.")


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
