"""`sparsify export`: a run or a model as a folder that another engine loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.commands.report import held_out_sequences, spread
from sparsify.errors import ExportError, check_choice
from sparsify.export.bundle import Bundle, BundleSettings, check_links, export
from sparsify.export.powerinfer.export import (
    PowerInferSettings,
    Written,
    check_model,
    check_predictors,
    export_powerinfer,
)
from sparsify.export.powerinfer.rules import FFN_TYPES, REST_TYPES
from sparsify.metadata import user_path
from sparsify.mixture.sequences.held_out import check_text_or_mixture
from sparsify.mixture.sequences.reader import collate
from sparsify.predictors import read_predictors
from sparsify.runs.load import load

logger = logging.getLogger(__name__)

FORMATS = ("hf", "llamacpp", "powerinfer", "powerinfer_hf")
WITHOUT_READERS = {
    "compressed_tensors": "compressed-tensors dropped its formats of sparse weights (its pull request 610), and so did vLLM, the engine that "
    "read them (vllm-project/vllm pull request 36799)",
}
"""Formats that somebody may look for, each with the reason why it would be of no use."""
LLAMACPP_OPTIONS = ("--dtype", "--context-tokens")
STATISTICS_TOKENS = 16_384
"""Default number of tokens on which firing neurons are counted."""


@dataclass(frozen=True)
class PowerInferOptions:
    predictors: Path | None = None
    ffn_type: str | None = None
    rest_type: str | None = None
    context_tokens: int | None = None
    vram_gb: float | None = None
    on: str | None = None
    tokens: int | None = None


def check_options(layout: str, options: PowerInferOptions, bundle_options: Sequence[str]) -> None:
    """Refuses an unknown format (RecipeError), and options that it would ignore (ExportError)."""
    if layout in WITHOUT_READERS:
        raise ExportError(
            f"--format {layout} is not written: {WITHOUT_READERS[layout]}.",
            allowed=f"Formats: {', '.join(FORMATS)}. hf stores sparse weights with their zeros, which every engine reads.",
        )
    check_choice("--format", layout, FORMATS)
    given = list(bundle_options)
    if layout == "hf":
        # A bundle takes predictors along.
        names = [name for name in vars(options) if name != "predictors"]
        given = [f"--{name.replace('_', '-')}" for name in names if vars(options)[name] is not None]
    elif layout == "llamacpp":
        names = [name for name in vars(options) if vars(options)[name] is not None]
        given += [f"--{name.replace('_', '-')}" for name in names]
        given = [option for option in given if option not in LLAMACPP_OPTIONS]
    elif layout == "powerinfer_hf":
        alone = [name for name in ("ffn_type", "rest_type", "vram_gb") if vars(options)[name] is not None]
        given += [f"--{name.replace('_', '-')}" for name in alone]
    if given:
        raise ExportError(
            f"--format {layout} does not take {', '.join(given)}.",
            next_step="Omit it, or choose another --format.",
        )


def to_bundle(
    run: str,
    to: Path,
    predictors: Path | None,
    dtype: str | None,
    shard_gb: float | None,
    license: str | None,
    evaluations: Sequence[Path],
    *,
    checked: bool,
) -> Bundle:
    """Writes the Hugging Face bundle of a run; None takes the default."""
    given = {"dtype": dtype, "predictors": predictors, "license": license, "shard_gb": shard_gb}
    settings = BundleSettings(
        **{name: value for name, value in given.items() if value is not None},
        evaluations=evaluations,
        checked=checked,
    )
    return export(user_path(run), to, settings=settings)


def to_powerinfer(model_or_run: str, to: Path, layout: str, options: PowerInferOptions) -> Written:
    """Writes a folder for PowerInfer.

    Raises:
        ExportError: If the format does not support the model.
    """
    ffn_type = options.ffn_type or FFN_TYPES[0]
    check_choice("--ffn-type", ffn_type, FFN_TYPES)
    if options.rest_type is not None:
        check_choice("--rest-type", options.rest_type, REST_TYPES)
    if options.on is not None:
        check_text_or_mixture(options.on)
    num_tokens = STATISTICS_TOKENS if options.tokens is None else options.tokens
    if num_tokens < 1 or (options.vram_gb is not None and options.vram_gb < 0):
        raise ExportError(
            f"Invalid --tokens {num_tokens} or --vram-gb {options.vram_gb}.",
            allowed="--tokens 1 or more, --vram-gb 0 or more.",
        )
    loaded = load(model_or_run)
    if loaded.trained is not None:
        check_links(loaded.trained)
    rest_type = options.rest_type or ffn_type
    # Before it needs predictors, which take long to train.
    vocabulary = check_model(loaded, ffn_type, options.context_tokens, rest_type, layout)
    folder = options.predictors or _predictors_folder(user_path(model_or_run))
    predictors = read_predictors(folder)
    settings = PowerInferSettings(
        name=re.sub("[^-.0-9A-Za-z_]+", "-", to.name),
        ffn_type=ffn_type,
        rest_type=rest_type,
        context_tokens=options.context_tokens,
        vram_bytes=None if options.vram_gb is None else int(options.vram_gb * 1e9),
        layout=layout,
    )
    check_predictors(loaded, predictors, settings)
    sequences, text = held_out_sequences(loaded, options.on, num_tokens)
    sequences = spread(sequences, num_tokens)  # a mixture gives at least one of every source
    logger.info(
        f"Counting which neurons of {loaded.name} fire on {sum(len(w.input_ids) for w in sequences):,} tokens: {text}"
    )
    batches = (collate([sequence]) for sequence in sequences)
    return export_powerinfer(loaded, predictors, batches, to, settings, vocabulary)


def _predictors_folder(given: Path) -> Path:
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    return run / "predictors"
