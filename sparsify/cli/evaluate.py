"""`sparsify evaluate`: a suite of tasks on one model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sparsify.cli.bounds import BATCH, COUNT, PROCESSES
from sparsify.cli.options import AsJson, TrustCode, console, log_progress, print_line
from sparsify.reporting.terminal import PlainConsole

if TYPE_CHECKING:
    from collections.abc import Callable


def evaluate(
    model: Annotated[
        str,
        typer.Argument(help="Model folder, Hub id, run folder, checkpoint or exported bundle"),
    ],
    suite: Annotated[
        str,
        typer.Option(help="Suite: open_llm_v1, commonsense, perplexity, quick, or the path of a YAML file."),
    ] = "quick",
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of the suite to run, comma-separated.", show_default="all"),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            envvar="SPARSIFY_EVAL_DATA",
            help="Folder of local copies of the evaluation sets.",
            show_default="the Hub's data",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(callback=COUNT.check, help="Items per task.", show_default="all")] = None,
    batch_size: Annotated[int, typer.Option(callback=BATCH.check, help="Requests per forward pass.")] = 8,
    dtype: Annotated[
        str | None,
        typer.Option(help="Compute type: float32 or bfloat16.", show_default="as stored"),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option(
            "--on",
            help="Mixture whose held-out text is measured.",
            show_default="the run's own, or quickstart",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            help="Folder to write.",
            show_default="in RUN/evaluations or evaluations/MODEL",
        ),
    ] = None,
    predictors: Annotated[
        Path | None,
        typer.Option(
            "--predictors",
            help="Folder of `sparsify predictors`: compute only the neurons predicted to fire.",
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(callback=PROCESSES.check, help="Evaluation processes, one per GPU if there are any.")
    ] = 1,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Evaluate each checkpoint of a run while it trains."),
    ] = False,
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Runs a suite of tasks on a model; measures exact zeros and active parameters in the same pass. Writes JSON, Markdown and
    a model card.

    The same command resumes an interrupted evaluation. `sparsify compare` compares results.

    Example: sparsify evaluate runs/quickstart --suite quick
    """
    from sparsify.commands.evaluate import evaluate_model
    from sparsify.commands.evaluate import follow as follow_run
    from sparsify.evaluation.report import results_table
    from sparsify.evaluation.request import EvalRequest
    from sparsify.training.suite_results import LINES_FILE

    some = tuple(tasks.split(",")) if tasks else ()
    request = EvalRequest(suite, some, data_dir, limit, batch_size, dtype, on, to, predictors, processes)
    command = " ".join(["sparsify", *sys.argv[1:]])
    log_progress(quiet=as_json)
    with _bars() as on_progress:
        if follow:
            found = follow_run(model, request, command, on_progress)
            where = f"{model}/{LINES_FILE} and {model}/evaluations/"
        else:
            results, folder = evaluate_model(model, request, command, on_progress)
            found, where = (
                [results],
                f"{folder}: results.json, results.md, model-index.yaml, items/",
            )
    if as_json:
        whole = [results.model_dump(mode="json") for results in found]
        console.print_json(json.dumps(whole if follow else whole[0]))
        return
    for results in found:
        console.print(results_table(results))
        for note in results.notes:
            print_line(note)
    print_line(where)


@contextmanager
def _bars() -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=PlainConsole(stderr=True)) as progress:

        def begin(task: str) -> Callable[[int, int], None]:
            bar = progress.add_task(task, total=None)
            return lambda done, total: progress.update(bar, completed=done, total=total)

        yield begin
