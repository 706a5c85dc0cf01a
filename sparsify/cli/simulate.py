"""`sparsify simulate`: decoding from a memory that is smaller than the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group
from rich.text import Text

from sparsify.cli.bounds import COUNT, NEW_TOKENS, SEQUENCE_LENGTH, SHARE
from sparsify.cli.options import AsJson, log_progress, print_result


def simulate(
    bundle: Annotated[
        str,
        typer.Argument(
            help="Bundle, model folder, Hub id, run folder or checkpoint; or profile:NAME, published zeros."
        ),
    ],
    device: Annotated[
        str,
        typer.Option(help="A device's name, a YAML file, or this_machine, which is measured."),
    ],
    memory: Annotated[
        str,
        typer.Option(
            help="Memory for weights, keys and values: sizes such as 2GB,4GB.",
            show_default="half of the feed-forward weights fit",
        ),
    ] = "",
    policy: Annotated[
        str, typer.Option(help="Cache policies: no_cache, static, lru, lfu, belady, belady_bypass.")
    ] = "no_cache,lru,lfu,belady",
    prefetch: Annotated[
        str, typer.Option(help="Prefetch of the next layer: none, persistence, hot, cluster, low_rank.")
    ] = "none",
    gamma: Annotated[
        str,
        typer.Option(
            help="Cache-aware masks with these γ, 0 to 1, decoded token by token.", show_default="the model's masks"
        ),
    ] = "",
    fetch: Annotated[
        str | None,
        typer.Option(
            help="What is fetched: neurons, gate_first, down, inputs, or dense.", show_default="what the zeros allow"
        ),
    ] = None,
    weights: Annotated[str, typer.Option(help="Format of the weights on the device: stored, int8 or int4.")] = "stored",
    on: Annotated[str, typer.Option("--on", help="Text or mixture; its held-out part is decoded.")] = "quickstart",
    tokens: Annotated[int, typer.Option(callback=SEQUENCE_LENGTH.check, help="Tokens of each decode.")] = 256,
    sequences: Annotated[int, typer.Option(callback=COUNT.check, help="Number of decodes.")] = 2,
    other_tokens: Annotated[
        int, typer.Option(callback=NEW_TOKENS.check, help="Tokens of other text, for static sets and prefetchers.")
    ] = 2048,
    context: Annotated[
        int | None,
        typer.Option(
            callback=NEW_TOKENS.check, help="Keys and values in memory at the end of a decode.", show_default="--tokens"
        ),
    ] = None,
    disk: Annotated[
        Path, typer.Option(help="Folder on the disk that is measured with --device this_machine.")
    ] = Path(),
    chart: Annotated[
        Path | None, typer.Option("--chart", help="Path of a picture (.png or .svg) of the time per token.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replays the masks of a decode through a device's memory and flash: hits, bytes, stalls and tokens per second.

    Example: sparsify simulate my-sparse-model --device phone --memory 2GB,4GB --policy lru,lfu
    """
    from sparsify.commands.simulate import Request
    from sparsify.commands.simulate import simulate as run
    from sparsify.simulation.result import check_picture, simulation_notes, simulation_table, write_picture

    log_progress(quiet=as_json)
    if chart is not None:
        check_picture(chart)
    result = run(
        Request(
            model=bundle,
            device=device,
            disk=disk,
            memories=_names(memory),
            policies=_names(policy),
            prefetches=_names(prefetch),
            gammas=SHARE.parse_list("--gamma", gamma),
            fetch=fetch,
            weights=weights,
            on=on,
            tokens=tokens,
            sequences=sequences,
            other_tokens=other_tokens,
            context_tokens=context,
        )
    )
    if chart is not None:
        write_picture(result, chart)
    notes = [Text(note, "dim") for note in simulation_notes(result)]
    print_result(result.model_dump_json(), Group(simulation_table(result), *notes), as_json)


def _names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
