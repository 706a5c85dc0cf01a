"""`sparsify export`: writing bundles, and checking them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from sparsify.cli.options import AsJson, console, print_line

WRITE = "write"


class ExportGroup(TyperGroup):
    """`export RUN --to DIR` is short for `export write RUN --to DIR`: what is no verb of the group is a run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Finds the verb; the default one where the first word is none."""
        if args and args[0] not in self.commands:
            args = [WRITE, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Options before the run belong to the default verb too."""
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = [WRITE, *args]
        return super().parse_args(ctx, args)


export_app = typer.Typer(
    cls=ExportGroup,
    no_args_is_help=True,
    help="Checkpoints that other people and engines load: [bold]sparsify export RUN --to DIR[/bold].",
)


@export_app.command(WRITE)
def export_write(
    model_or_run: Annotated[
        str,
        typer.Argument(
            help="Run folder or one checkpoint of a run; for PowerInfer a model or bundle too"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            help="hf, a bundle for transformers; powerinfer, its GGUF; powerinfer_hf, what PowerInfer's converter takes."
        ),
    ] = "hf",
    predictors: Annotated[
        Path | None, typer.Option("--predictors", help="Their folder; RUN/predictors else.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="hf: bf16, fp16 or fp32; as it was trained else.")
    ] = None,
    shard_gb: Annotated[
        float | None, typer.Option(help="hf: size of a shard; 5 else. Memory holds one.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="hf: licence of the base model, for the card.")
    ] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="hf: folder of `sparsify evaluate` for the card; may be repeated."),
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option("--push-to-hub", help="hf: publish it as OWNER/NAME.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="hf: make a new repository private.")
    ] = False,
    unchecked: Annotated[
        bool,
        typer.Option(
            "--unchecked", help="hf: leave out the check, which takes memory for the whole model."
        ),
    ] = False,
    ffn_type: Annotated[
        str | None, typer.Option(help="PowerInfer: f16 (as it is) or q4_0, of the FFN weights.")
    ] = None,
    context_tokens: Annotated[
        int | None, typer.Option(help="PowerInfer: longest context; the model's own else.")
    ] = None,
    vram_gb: Annotated[
        float | None,
        typer.Option(help="PowerInfer: GPU memory for hot neurons; writes the split file."),
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", help="PowerInfer: text or mixture to count firing on.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="PowerInfer: how many tokens of it; 16,384 else.")
    ] = None,
) -> None:
    """Writes a bundle that loads with transformers alone, after checking it in a fresh offline process; or a PowerInfer file.

    Example: sparsify export runs/quickstart --to my-sparse-model
    """
    from sparsify.commands.export import PowerInferOptions, check_options, to_bundle, to_powerinfer

    options = PowerInferOptions(predictors, ffn_type, context_tokens, vram_gb, on, tokens)
    hub = {"--push-to-hub": push_to_hub, "--private": private or None}
    bundle_options = {"--dtype": dtype, "--shard-gb": shard_gb, "--license": license} | hub
    bundle_options |= {"--evaluation": evaluation, "--unchecked": unchecked}
    check_options(format, options, [name for name, value in bundle_options.items() if value])
    if format != "hf":
        written = to_powerinfer(model_or_run, to, format, options)
        print_line(f"{to / written.model_file}: {written.size_bytes / 1e6:.1f} MB in all")
        for note in written.notes:
            print_line(f"Note: {note}")
        return
    bundle = to_bundle(
        *(model_or_run, to, predictors, dtype, shard_gb, license, evaluation or []),
        checked=not unchecked,
    )
    print_line(f"{bundle.folder}: {bundle.num_files} files, {bundle.size_bytes / 1e6:.1f} MB")
    if bundle.acceptance is None:
        print_line(f"Not checked. Where memory holds the whole model: sparsify export verify {to}")
    else:
        print_line(f"Checked: {bundle.acceptance.sentence()}.")
    if bundle.has_predictors:
        print_line("Predictors are in predictors/.")
    if push_to_hub is not None:
        from sparsify.export.hub import push_to_hub as publish

        print_line(f"Published: {publish(bundle.folder, push_to_hub, private=private)}")


@export_app.command("verify")
def export_verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that `sparsify export` wrote")],
    as_json: AsJson = False,
) -> None:
    """Checks a bundle: hashes, names and shapes of tensors, logits against those of the trained model, zeros, predictors.

    Ends with 2 where it was damaged or edited, and says what.

    Example: sparsify export verify my-sparse-model
    """
    from sparsify.export.check import refuse_broken, verify

    with Console(stderr=True).status("") as status:
        checks = verify(bundle.expanduser(), status.update)
    if as_json:
        console.print_json(json.dumps([vars(check) for check in checks]))
    else:
        for check in checks:
            print_line(f"{'holds ' if check.holds else 'BROKEN'}  {check.name}: {check.found}")
    refuse_broken(bundle, checks)
