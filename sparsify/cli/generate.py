"""`sparsify generate`: text from a bundle by sparse decoding."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from sparsify.cli.bounds import NEW_TOKENS, SEED, SHARE, TEMPERATURE, THREADS
from sparsify.cli.options import AsJson, print_result
from sparsify.errors import RunError
from sparsify.reporting.terminal import plain

if TYPE_CHECKING:
    from sparsify.commands.generate import Generated, Offload

MEGA = 1e6


def generate(
    bundle: Annotated[str, typer.Argument(help="Bundle, model folder, Hub id, run folder or checkpoint")],
    prompt: Annotated[str, typer.Argument(help="Text to continue")],
    tokens: Annotated[
        int,
        typer.Option(
            callback=NEW_TOKENS.check, help="Maximum number of new tokens; the model's context ends a text too."
        ),
    ] = 128,
    temperature: Annotated[
        float, typer.Option(callback=TEMPERATURE.check, help="Sampling temperature; 0 = greedy.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(callback=SEED.check, help="Random seed for sampling.")] = 1,
    weights: Annotated[
        str,
        typer.Option(
            help="Format of the projections' weights for decoding: stored, or rounded into blocks of int8 or int4."
        ),
    ] = "stored",
    predictors: Annotated[
        Path | None,
        typer.Option(help="Folder with predictors.safetensors.", show_default="exact decoding"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(callback=THREADS.check, help="Number of threads.", show_default="torch's own")
    ] = None,
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Decode without the kernels, for comparison; with --memory, read every row."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Limit on this process's memory, such as 4GB: neurons stay in a file that is written once, and are read as needed.",
            show_default="none: the model is loaded whole",
        ),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(
            help="With --memory: which neurons stay in memory: no_cache, static (those that fired most in the prompt), lru or lfu."
        ),
    ] = "lru",
    prefetch: Annotated[
        str,
        typer.Option(
            help="With --memory: which neurons of the next layer are read ahead: none, persistence (those of the last token) or "
            "frequency (those used most)."
        ),
    ] = "none",
    gamma: Annotated[
        float,
        typer.Option(
            callback=SHARE.check,
            help="With --memory and masks that choose inputs (DIP): below 1 they prefer what is in memory, by this factor of the "
            "sizes of what is not.",
        ),
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Continues a prompt, reading only the weights of neurons that fire; then prints the speed and the bytes read.

    Example: sparsify generate my-sparse-model "def read_json(path):"
    """
    from sparsify.commands.generate import MemoryLimit
    from sparsify.commands.generate import generate as run

    if memory is None and (policy, prefetch, gamma) != ("lru", "none", 1.0):
        raise RunError(
            "--policy, --prefetch and --gamma change nothing without --memory.",
            next_step="Give --memory, or omit them.",
        )
    result = run(
        bundle,
        prompt,
        num_tokens=tokens,
        temperature=temperature,
        seed=seed,
        weights=weights,
        predictors=predictors,
        threads=threads,
        dense=dense,
        write=(lambda _: None) if as_json else _write,
        limit=None if memory is None else MemoryLimit(memory, policy, prefetch, _tell, gamma),  # pyright: ignore[reportArgumentType]
    )
    print_result(json.dumps(dataclasses.asdict(result)), Text(f"\n\n{_summary(result)}", "dim"), as_json)


def _tell(text: str) -> None:
    sys.stderr.write(f"{plain(text)}\n")
    sys.stderr.flush()


def _write(text: str) -> None:
    sys.stdout.write(plain(text))
    sys.stdout.flush()


def _summary(result: Generated) -> str:
    ffn, other = result.ffn_bytes_per_token / MEGA, result.other_bytes_per_token / MEGA
    dense = (result.dense_ffn_bytes_per_token + result.dense_other_bytes_per_token) / MEGA
    speed = result.tokens_per_second
    lines = [
        f"{result.new_tokens} tokens"
        + (f", {speed:.1f} tokens/s" if speed else "")
        + f" after a prompt of {result.prompt_tokens} tokens ({result.prompt_seconds:.2f} s); {_BACKENDS[result.backend]}"
    ]
    if result.kept_bytes:
        held = (
            "a copy of the integers" if result.backend == "integers" else f"weights held in blocks of {result.weights}"
        )
        lines.append(f"{held}: {result.kept_bytes / MEGA:,.1f} MB")
    if result.touched_share is not None and result.fired_share is not None:
        lines.append(
            f"{result.fired_share:.1%} of the neurons fired; {result.touched_share:.1%} of the feed-forward weights "
            "were read"
        )
    lines.append(
        f"weights read per token: {ffn + other:,.1f} MB ({ffn:,.1f} feed-forward, {other:,.1f} other); "
        f"stored and dense: {dense:,.1f} MB"
    )
    if result.offload is not None:
        lines += _offload_lines(result.offload)
    return "\n".join(lines)


def _offload_lines(one: Offload) -> list[str]:
    how = "past the page cache" if one.direct else "through the page cache"
    return [
        f"memory: {one.peak_bytes / MEGA:,.0f} MB at most, of {one.memory_bytes / MEGA:,.0f} allowed; {one.neuron_bytes / MEGA:,.0f} "
        f"MB of neurons ({one.slots:,} slots, {one.held_share:.0%} of the rows that every token reads)",
        f"read from {one.neuron_file} per token, {how}: {one.read_bytes_per_token / MEGA:,.2f} MB, of it "
        f"{one.stall_bytes_per_token / MEGA:,.2f} MB of neurons that were not read ahead",
        f"{one.hit_rate:.1%} of the neurons needed were in memory ({one.policy}); {one.over_fetch:.2f} read ahead in vain for each "
        f"(prefetch: {one.prefetch}); {one.wait_ms_per_token:,.1f} of {one.ms_per_token:,.1f} ms a token were spent waiting",
    ]


_BACKENDS = {
    "native": "C++ kernels",
    "torch": "torch's operators, as there is no compiler",
    "integers": "C++ kernels for integers, one projection after the other",
    "dense": "dense",
}
