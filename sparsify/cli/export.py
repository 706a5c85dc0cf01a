"""`sparsify export`: writing bundles, and checking them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sparsify.cli.bounds import MEMORY_GB, MEMORY_GB_OR_NONE, SEQUENCE_LENGTH, TOKENS
from sparsify.cli.options import AsJson, TrustCode, console, print_line, status_line
from sparsify.metadata import user_path

WRITE = "write"


class ExportGroup(TyperGroup):
    """Makes `export RUN --to DIR` short for `export write RUN --to DIR`: a first word that is not a verb is a run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = [WRITE, *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = [WRITE, *args]
        return super().parse_args(ctx, args)


export_app = typer.Typer(
    cls=ExportGroup,
    no_args_is_help=True,
    help="Write and verify checkpoints for other users and engines: [bold]sparsify export RUN --to DIR[/bold].",
)


@export_app.command(WRITE)
def export_write(
    model_or_run: Annotated[
        str,
        typer.Argument(
            help="Run folder or one of its checkpoints; for llama.cpp and PowerInfer also a model or bundle"
        ),
    ],
    to: Annotated[Path, typer.Option("--to", help="Folder to write; must not exist.")],
    format: Annotated[
        str,
        typer.Option(
            help="Format: hf (a transformers bundle), llamacpp (GGUF of dense and ReGLU models), powerinfer (GGUF) or powerinfer_hf "
            "(input of PowerInfer's converter)."
        ),
    ] = "hf",
    predictors: Annotated[
        Path | None,
        typer.Option("--predictors", help="Folder of the predictors.", show_default="RUN/predictors"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="hf, llama.cpp: type of the weights: bf16, fp16 or fp32; llama.cpp also q8_0 or q4_0.",
            show_default="as trained",
        ),
    ] = None,
    shard_gb: Annotated[
        float | None,
        typer.Option(
            callback=MEMORY_GB.check, help="hf: maximum shard size in GB; peak memory is one shard.", show_default="5"
        ),
    ] = None,
    license: Annotated[str | None, typer.Option(help="hf: licence of the base model, for the model card.")] = None,
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(help="hf: folder of `sparsify evaluate` for the model card; repeatable."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", help="hf: Hub repository to publish to, as OWNER/NAME."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="hf: make a new repository private.")] = False,
    unchecked: Annotated[
        bool,
        typer.Option("--unchecked", help="hf: skip the check, which needs memory for the whole model."),
    ] = False,
    ffn_type: Annotated[
        str | None,
        typer.Option(help="PowerInfer: type of the FFN weights: f16 or q4_0.", show_default="f16"),
    ] = None,
    rest_type: Annotated[
        str | None,
        typer.Option(
            help="PowerInfer: type of attention, embedding and head: f16, q8_0 or q4_0.", show_default="as --ffn-type"
        ),
    ] = None,
    context_tokens: Annotated[
        int | None,
        typer.Option(
            callback=SEQUENCE_LENGTH.check,
            help="llama.cpp, PowerInfer: maximum context length.",
            show_default="the model's own",
        ),
    ] = None,
    vram_gb: Annotated[
        float | None,
        typer.Option(
            callback=MEMORY_GB_OR_NONE.check,
            help="PowerInfer: GPU memory for hot neurons in GB; writes the split file.",
        ),
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", help="PowerInfer: text or mixture on which to count firing neurons."),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(
            callback=TOKENS.check, help="PowerInfer: tokens to count firing neurons on.", show_default="16,384"
        ),
    ] = None,
) -> None:
    """Writes a bundle that loads with transformers alone, after checking it in a fresh offline process; or a file for
    llama.cpp or PowerInfer.

    Example: sparsify export runs/quickstart --to my-sparse-model
    """
    from sparsify.commands.export import PowerInferOptions, check_options, to_bundle, to_powerinfer
    from sparsify.predictors.engines import OWN

    options = PowerInferOptions(predictors, ffn_type, rest_type, context_tokens, vram_gb, on, tokens)
    hub = {"--push-to-hub": push_to_hub, "--private": private or None}
    bundle_options = {"--dtype": dtype, "--shard-gb": shard_gb, "--license": license} | hub
    bundle_options |= {"--evaluation": evaluation, "--unchecked": unchecked}
    check_options(format, options, [name for name, value in bundle_options.items() if value])
    if format == "llamacpp":
        from sparsify.export.llamacpp.export import export_llamacpp

        with status_line() as on_progress:
            file = export_llamacpp(model_or_run, to, dtype, context_tokens, on_progress)
        print_line(f"{to / file.model_file}: {file.size_bytes / 1e6:.1f} MB in total")
        for note in file.notes:
            print_line(f"Note: {note}")
        return
    if format != "hf":
        written = to_powerinfer(model_or_run, to, format, options)
        print_line(f"{to / written.model_file}: {written.size_bytes / 1e6:.1f} MB in total")
        for note in written.notes:
            print_line(f"Note: {note}")
        return
    if push_to_hub is not None:
        from sparsify.export.bundle import check_repository

        check_repository(push_to_hub)
    bundle = to_bundle(
        *(model_or_run, to, predictors, dtype, shard_gb, license, evaluation or []),
        checked=not unchecked,
    )
    print_line(f"{bundle.folder}: {bundle.num_files} files, {bundle.size_bytes / 1e6:.1f} MB")
    if bundle.acceptance is None:
        print_line(f"Not checked. To check it, with memory for the whole model: sparsify export verify {to}")
    else:
        print_line(f"Checked: {bundle.acceptance.sentence()}.")
    if bundle.predictors is not None:
        print_line(f"Predictors are in predictors/. {bundle.predictors.open_question(OWN)}".rstrip())
    if push_to_hub is not None:
        from sparsify.export.bundle import push_to_hub as publish

        print_line(f"Published: {publish(bundle.folder, push_to_hub, private=private)}")


@export_app.command("verify")
def export_verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that `sparsify export` wrote")],
    trust_code: TrustCode = False,
    as_json: AsJson = False,
) -> None:
    """Checks a bundle: hashes, code, names and shapes of tensors, logits against those of the trained model, zeros, predictors.

    Exits with 2 if it was damaged or edited, and lists the failed checks.

    Example: sparsify export verify my-sparse-model
    """
    from sparsify.export.check import refuse_broken, verify

    with status_line() as on_progress:
        checks = verify(user_path(bundle), on_progress)
    if as_json:
        console.print_json(json.dumps([vars(check) for check in checks]))
    else:
        for check in checks:
            print_line(f"{'holds ' if check.holds else 'BROKEN'}  {check.name}: {check.found}")
    refuse_broken(bundle, checks)
