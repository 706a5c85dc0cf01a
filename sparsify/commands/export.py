"""`sparsify export`: a run or a model as a folder that another engine loads."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsify.commands.report import held_out_sequences
from sparsify.errors import ExportError, check_choice
from sparsify.export.bundle import Bundle, BundleSettings, export
from sparsify.export.powerinfer.export import PowerInferSettings, Written, check, export_powerinfer
from sparsify.export.powerinfer.rules import FFN_TYPES
from sparsify.mixture.sequences.held_out import check_text_or_mixture
from sparsify.mixture.sequences.reader import collate
from sparsify.predictors import read_predictors
from sparsify.runs.load import load

logger = logging.getLogger(__name__)

FORMATS = ("hf", "powerinfer", "powerinfer_hf")
STATISTICS_TOKENS = 16_384
"""Default number of tokens on which firing neurons are counted."""


@dataclass(frozen=True)
class PowerInferOptions:
    """Options of the PowerInfer formats; None if not given."""

    predictors: Path | None = None
    ffn_type: str | None = None
    context_tokens: int | None = None
    vram_gb: float | None = None
    on: str | None = None
    tokens: int | None = None


def check_options(layout: str, options: PowerInferOptions, bundle_options: Sequence[str]) -> None:
    """Refuses an unknown format, and options that it would ignore.

    Args:
        layout: Value of --format.
        options: Options of the PowerInfer formats.
        bundle_options: Names of the given options that only the Hugging Face bundle takes.

    Raises:
        RecipeError: If the format is unknown.
        ExportError: If an option does not belong to it.
    """
    check_choice("--format", layout, FORMATS)
    given = list(bundle_options)
    if layout == "hf":
        # A bundle takes predictors along.
        names = [name for name in vars(options) if name != "predictors"]
        given = [f"--{name.replace('_', '-')}" for name in names if vars(options)[name] is not None]
    elif layout == "powerinfer_hf":
        alone = [name for name in ("ffn_type", "vram_gb") if vars(options)[name] is not None]
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
    return export(Path(run).expanduser(), to, settings=settings)


def to_powerinfer(model_or_run: str, to: Path, layout: str, options: PowerInferOptions) -> Written:
    """Writes a folder for PowerInfer.

    Args:
        model_or_run: Model folder, Hub id, bundle, run folder or checkpoint.
        to: Folder to write; must not exist.
        layout: `powerinfer` or `powerinfer_hf`.
        options: Its options.

    Raises:
        ExportError: If the format does not support the model.
    """
    ffn_type = options.ffn_type or FFN_TYPES[0]
    check_choice("--ffn-type", ffn_type, FFN_TYPES)
    if options.on is not None:
        check_text_or_mixture(options.on)
    num_tokens = STATISTICS_TOKENS if options.tokens is None else options.tokens
    if num_tokens < 1 or (options.vram_gb is not None and options.vram_gb < 0):
        raise ExportError(
            f"Invalid --tokens {num_tokens} or --vram-gb {options.vram_gb}.",
            allowed="--tokens 1 or more, --vram-gb 0 or more.",
        )
    loaded = load(model_or_run)
    folder = options.predictors or _predictors_folder(Path(model_or_run).expanduser())
    predictors = read_predictors(folder)
    settings = PowerInferSettings(
        name=re.sub("[^-.0-9A-Za-z_]+", "-", to.name),
        ffn_type=ffn_type,
        context_tokens=options.context_tokens,
        vram_bytes=None if options.vram_gb is None else int(options.vram_gb * 1e9),
        layout=layout,
    )
    check(loaded, predictors, settings)
    sequences, text = held_out_sequences(loaded, options.on, num_tokens)
    logger.info(
        f"Counting which neurons of {loaded.name} fire on {sum(len(w.input_ids) for w in sequences):,} tokens: {text}"
    )
    batches = (collate([sequence]) for sequence in sequences)
    return export_powerinfer(loaded, predictors, batches, to, settings)


def _predictors_folder(given: Path) -> Path:
    run = given.parent.parent if given.parent.name == "checkpoints" else given
    return run / "predictors"
