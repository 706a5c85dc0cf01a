"""`sparsify predictors`: which neurons will fire, for engines that read only those."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sparsify.cli.options import AsJson, console, log_progress

predictors_app = typer.Typer(
    no_args_is_help=True,
    help="Small networks that say which neurons will fire, so that an engine reads only their weights.",
)

ModelOrRun = Annotated[str, typer.Argument(help="Model folder, Hub id, run folder or checkpoint")]
On = Annotated[str | None, typer.Option("--on", help="Text file (plain, jsonl, gz) or mixture.")]


@predictors_app.command("train")
def predictors_train(
    model_or_run: ModelOrRun,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Folder to write; RUN/predictors or predictors/NAME else."),
    ] = None,
    on: On = None,
    tokens: Annotated[
        int, typer.Option(help="Held-out tokens; one sequence in eight is kept for judging.")
    ] = 131_072,
    passes: Annotated[int, typer.Option(help="How often they are read.")] = 4,
    recall: Annotated[
        float, typer.Option(help="Share of the firing neurons to predict at the score 0.")
    ] = 0.95,
    budget_share: Annotated[
        float, typer.Option(help="Largest size of the predictors, as a share of the FFN weights.")
    ] = 0.1,
    rank: Annotated[
        list[int] | None,
        typer.Option(
            help="A rank to try; may be given again. Else 1/16 to 1/2 of the hidden size."
        ),
    ] = None,
    input: Annotated[
        str, typer.Option(help="residual, as PowerInfer feeds it, or normed.")
    ] = "residual",
    learning_rate: Annotated[float, typer.Option(help="At the start.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Decides the start and the order of sequences.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Trains a predictor for every layer, or every expert, on held-out text. Goes on where it was interrupted.

    Example: sparsify predictors train runs/quickstart --recall 0.98
    """
    from typing import Any, cast

    from sparsify.commands.predictors import train
    from sparsify.predictors.report import training_summary
    from sparsify.predictors.train import Settings

    settings = Settings(
        cast(Any, input), recall, budget_share, tuple(rank or ()), passes, learning_rate, seed
    )
    log_progress(quiet=as_json)
    with Console(stderr=True).status("") as status:
        result, folder = train(model_or_run, on, tokens, to, settings, status.update)
    if as_json:
        console.print_json(result.facts.model_dump_json())
    else:
        console.print(training_summary(result, folder, model_or_run))


@predictors_app.command("judge")
def predictors_judge(
    model_or_run: ModelOrRun,
    predictors: Annotated[
        Path | None,
        typer.Option("--predictors", help="Their folder; where `train` puts them else."),
    ] = None,
    on: On = None,
    tokens: Annotated[int, typer.Option(help="Tokens to judge on.")] = 8_192,
    max_loss_rise: Annotated[
        float, typer.Option(help="Limit on the rise of the loss, nats per token.")
    ] = 0.02,
    threshold: Annotated[
        list[float] | None, typer.Option(help="A threshold to try; may be given again.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Runs the model with predicted masks over thresholds, and chooses the one that reads least within a limit on the loss.

    Recall, precision, loss and predicted speed-up stand beside the dense and the exact model: HTML, PNG, CSV, JSON. The
    predictors get the threshold that is chosen. Ends with 2 where none may be chosen.

    Example: sparsify predictors judge runs/quickstart --max-loss-rise 0.01
    """
    from sparsify.commands.predictors import judge, refuse_useless
    from sparsify.predictors.report import judgement_summary

    log_progress(quiet=as_json)
    with Console(stderr=True).status("") as status:
        result, folder = judge(
            model_or_run,
            predictors,
            on,
            tokens,
            max_loss_rise,
            threshold or [],
            status.update,
        )
    if as_json:
        console.print_json(result.model_dump_json())
    else:
        console.print(judgement_summary(result, folder))
    refuse_useless(result)
