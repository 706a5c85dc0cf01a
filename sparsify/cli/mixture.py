"""`sparsify mixture`: preview, stats and tuning of data mixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsify.cli.bounds import COUNT, SEQUENCE_LENGTH, TOKENS, TRIALS
from sparsify.cli.options import AsJson, Overrides, console, log_progress, print_result

mixture_app = typer.Typer(
    no_args_is_help=True,
    help="Mixtures: preview training sequences, measure sources, find better ratios.",
)
DEFAULT_TOKENIZER = "package:sparsify/assets/quickstart_base"
Tokenizer = Annotated[
    str,
    typer.Option("--tokenizer", help="Tokenizer: model folder, Hub id or package:NAME/PATH."),
]
SequenceLength = Annotated[
    int, typer.Option("--sequence-length", callback=SEQUENCE_LENGTH.check, help="Sequence length in tokens.")
]


@mixture_app.command("preview")
def mixture_preview(
    mixture: Annotated[str, typer.Argument(help="Mixture name or path of a YAML file")],
    sequences: Annotated[
        int, typer.Option("--sequences", callback=COUNT.check, help="Number of sequences per source.")
    ] = 1,
    sequence_length: SequenceLength = 256,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
) -> None:
    """Shows training sequences of every source, with document boundaries and the tokens that carry loss.

    Example: sparsify mixture preview quickstart --sequences 2
    """
    from sparsify.commands.mixture import preview, sequence_preview

    for sequence in preview(mixture, tokenizer, sequences, sequence_length):
        styled = console.color_system is not None
        console.print(sequence_preview(sequence, styled=styled), soft_wrap=False)


@mixture_app.command("stats")
def mixture_stats(
    mixture: Annotated[str, typer.Argument(help="Mixture name or path of a YAML file")],
    budget_tokens: Annotated[
        int, typer.Option("--budget-tokens", callback=TOKENS.check, help="Training budget in tokens.")
    ] = 1_000_000,
    sequence_length: SequenceLength = 2048,
    tokenizer: Tokenizer = DEFAULT_TOKENIZER,
    as_json: AsJson = False,
) -> None:
    """Measures a mixture: documents, tokens, tokens per document, packing efficiency, epochs at a budget.

    Example: sparsify mixture stats quickstart --budget-tokens 10000000
    """
    from sparsify.commands.mixture import mixture_table, stats

    log_progress(quiet=as_json)
    result = stats(mixture, tokenizer, budget_tokens, sequence_length)
    print_result(result.model_dump_json(), mixture_table(result), as_json)


@mixture_app.command("tune")
def mixture_tune(
    recipe: Annotated[str, typer.Argument(help="Recipe name or path of a YAML file")],
    over: Annotated[
        list[str],
        typer.Option(
            help="Shares to vary: mixture.instruction_token_share=0:0.4, token_shares, or SOURCE=0.2:0.8; repeatable."
        ),
    ],
    trials: Annotated[
        int, typer.Option(callback=TRIALS.check, help="Number of proxy runs, including one with the recipe's mixture.")
    ],
    trial_tokens: Annotated[int, typer.Option(callback=TOKENS.check, help="Training tokens of each proxy run.")],
    overrides: Overrides = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(help="Weight of a domain's loss, as DOMAIN=FACTOR times its share in the mixture; repeatable."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Path of the tuned mixture's YAML file; default: in the tuning's folder."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the mixture even if the data do not support it.")
    ] = False,
    confirm: Annotated[
        bool,
        typer.Option("--confirm", help="Train both mixtures again with another seed, and compare them."),
    ] = False,
    confirm_tokens: Annotated[
        int | None,
        typer.Option(
            callback=TOKENS.check, help="Training tokens of the confirmation's runs; default: --trial-tokens."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Finds better mixture ratios with short proxy runs and a regression, and writes a new mixture file.

    Writes no file if the trials do not support a choice. The same command resumes an interrupted tuning.

    Example: sparsify mixture tune quickstart --over token_shares --trials 8 --trial-tokens 40960 --confirm
    """
    from sparsify.tuning.report import tune_summary
    from sparsify.tuning.tune import TuneRequest, tune

    request = TuneRequest(
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
    found, folder = tune(request)
    print_result(found.model_dump_json(), tune_summary(found, folder, recipe), as_json)
