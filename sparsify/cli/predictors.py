"""`sparsify predictors`: predictors of firing neurons, for engines that read only their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.bounds import LEARNING_RATE, NATS, REPEATS, SCORE, SEED, SHARE_INSIDE, SIZE_SHARE, TOKENS, WIDTH
from sparsify.cli.options import AsJson, console, log_progress, status_line

predictors_app = typer.Typer(
    no_args_is_help=True,
    help="Train and evaluate small networks that predict which neurons fire, so that an engine reads only those.",
)

ModelOrRun = Annotated[str, typer.Argument(help="Model folder, Hub id, run folder or checkpoint")]
On = Annotated[str | None, typer.Option("--on", help="Text file (plain, jsonl, gz) or mixture.")]


@predictors_app.command("train")
def predictors_train(
    model_or_run: ModelOrRun,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Output folder; default: RUN/predictors or predictors/NAME."),
    ] = None,
    on: On = None,
    tokens: Annotated[
        int, typer.Option(callback=TOKENS.check, help="Held-out tokens; one sequence in eight is kept for evaluation.")
    ] = 131_072,
    passes: Annotated[int, typer.Option(callback=REPEATS.check, help="Epochs over the tokens.")] = 4,
    recall: Annotated[
        float, typer.Option(callback=SHARE_INSIDE.check, help="Share of the firing neurons to predict at a score of 0.")
    ] = 0.95,
    budget_share: Annotated[
        float,
        typer.Option(callback=SIZE_SHARE.check, help="Largest size of the predictors, as a share of the FFN weights."),
    ] = 0.1,
    rank: Annotated[
        list[int] | None,
        typer.Option(callback=WIDTH.check, help="Rank to try (repeatable); default: 1/16 to 1/2 of the hidden size."),
    ] = None,
    input: Annotated[
        str, typer.Option(help="Input of the predictors: residual (as in PowerInfer) or normed.")
    ] = "residual",
    learning_rate: Annotated[float, typer.Option(callback=LEARNING_RATE.check, help="Initial learning rate.")] = 3e-3,
    seed: Annotated[
        int, typer.Option(callback=SEED.check, help="Seed of the initial weights and the order of sequences.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Trains a predictor for every layer, or every expert, on held-out text. The same command resumes it.

    Example: sparsify predictors train runs/quickstart --recall 0.98
    """
    from typing import Any, cast

    from sparsify.commands.predictors import train
    from sparsify.predictors.report import training_summary
    from sparsify.predictors.trainer import Settings

    settings = Settings(cast(Any, input), recall, budget_share, tuple(rank or ()), passes, learning_rate, seed)
    log_progress(quiet=as_json)
    with status_line() as on_progress:
        result, folder = train(model_or_run, on, tokens, to, settings, on_progress)
    if as_json:
        console.print_json(result.facts.model_dump_json())
    else:
        console.print(training_summary(result, folder, model_or_run))


@predictors_app.command("evaluate")
def predictors_evaluate(
    model_or_run: ModelOrRun,
    predictors: Annotated[
        Path | None,
        typer.Option("--predictors", help="Folder of the predictors; default: where `train` writes them."),
    ] = None,
    on: On = None,
    tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Tokens to evaluate on.")] = 8_192,
    max_loss_rise: Annotated[
        float, typer.Option(callback=NATS.check, help="Limit on the rise of the loss, nats per token.")
    ] = 0.02,
    threshold: Annotated[
        list[float] | None,
        typer.Option(callback=SCORE.check, help="Threshold to try (repeatable); default: ten, by recall."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="Engine whose arithmetic is measured: sparsify, or powerinfer, which drops the model's thresholds."
        ),
    ] = "sparsify",
    as_json: AsJson = False,
) -> None:
    """Runs the model with predicted masks over thresholds, and chooses the one that reads least within a limit on the loss.

    Writes recall, precision, loss and predicted speed-up, next to those of the dense and the exact model, as HTML, PNG, CSV
    and JSON. The chosen threshold is written to the predictors. Exits with 2 if no threshold can be chosen.

    Example: sparsify predictors evaluate runs/quickstart --max-loss-rise 0.01
    """
    from sparsify.commands.predictors import evaluate, refuse_useless
    from sparsify.predictors.report import evaluation_summary

    log_progress(quiet=as_json)
    with status_line() as on_progress:
        result, folder = evaluate(
            model_or_run,
            predictors,
            on,
            tokens,
            max_loss_rise,
            threshold or [],
            engine,
            on_progress,
        )
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(evaluation_summary(result, folder))
    refuse_useless(result)
