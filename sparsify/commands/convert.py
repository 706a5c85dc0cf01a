"""`sparsify convert`: converts a dense checkpoint to a sparse-activated one, and measures the change of its loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Group, RenderableType

from sparsify.conversion.architecture import stored_activation
from sparsify.conversion.convert import Converted, conversion
from sparsify.conversion.source_checkpoint import locate, read_checkpoint
from sparsify.conversion.source_tensors import check_base_loss
from sparsify.conversion.sparse_folder import load_sparse
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.conversion.weight_zeros import PROJECTIONS
from sparsify.errors import RecipeError
from sparsify.methods.base import Mask, Upcycling, method_of
from sparsify.methods.calibrate import Calibration, CalibrationStage
from sparsify.methods.calibrated_checkpoint import convert_calibrated
from sparsify.methods.calibrated_replacement import BARE
from sparsify.mixture.sequences.held_out import (
    ValidationSequences,
    check_text_or_mixture,
    sequences_from,
    text_or_mixture_calibration,
)
from sparsify.mixture.sequences.reader import PackedSequence, collate
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.models import ACTIVATIONS, SparseConfig, site_rules
from sparsify.models.activations import activation_words
from sparsify.models.masking import COUNTED_SITES
from sparsify.recipe.model import ModelSection
from sparsify.recipe.recipe import CACHE_DIR
from sparsify.recipe.sparsification import (
    ActivationSection,
    ConversionSection,
    check_activation,
    check_conversion,
)
from sparsify.recipe.training import SEED
from sparsify.reporting.numbers import share
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked
from sparsify.sparsity.report import measure

CALIBRATION_TOKENS = 131_072
"""Default of --calibration-tokens."""
CALIBRATE_ON = "quickstart"
"""Default of --calibrate-on with --method."""


@dataclass(frozen=True)
class Conversion:
    converted: Converted
    text: str
    num_tokens: int
    """Tokens that the stages were measured on."""
    stages: list[CalibrationStage]
    """What the source is, as `dense`, and `bare replacement`; of a calibrated replacement all of its stages."""
    calibration: Calibration | None


def convert_model(source: str, activation: ActivationSection, to: Path, on: str, num_tokens: int) -> Conversion:
    """Converts a checkpoint, and measures the activation replacement on `num_tokens` of a text or a mixture."""
    check_activation(activation, "--activation", "--gate-threshold")
    check_text_or_mixture(on)
    model = ModelSection(source=source)
    stages, measured_tokens = [], 0
    # Where it cannot be measured, nothing remains that the next try would find in its way.
    with conversion(model, activation, to, seed=0, dtype=torch.bfloat16) as made:  # nothing is drawn
        config = made.config
        sequences, text = sequences_from(
            on,
            load_tokenizer(made.folder),
            num_tokens=num_tokens,
            sequence_length=_sequence_length(config),
            cache_dir=_cache(),
        )
        source_words = activation_words(config.base_ffn_activation, is_masked=bool(config.sparsification))
        for stage, name, threshold in (
            (source_words, config.base_ffn_activation, config.base_ffn_gate_threshold),
            ("bare replacement", config.ffn_activation, config.ffn_gate_threshold),
        ):
            model_of_stage = load_sparse(made.folder, name, gate_threshold=threshold)
            batches = (collate([sequence]) for sequence in sequences)
            report, _ = measure(model_of_stage, batches, name=str(to), text=text)
            if not stages:
                check_base_loss(report.loss, source)
            stages.append(CalibrationStage(stage, {text: report.loss}, report.loss, report.product_zeros))
            measured_tokens = report.num_tokens
    return Conversion(replace(made, folder=to), text, measured_tokens, stages, None)


def convert_model_calibrated(
    source: str,
    activation: ActivationSection,
    settings: ConversionSection,
    to: Path,
    calibrate_on: str,
    num_tokens: int,
) -> Conversion:
    """Converts a checkpoint with a method, and measures each stage on `num_tokens`: of a text those after the
    calibration tokens, of a mixture held-out ones.
    """
    check_activation(activation, "--activation", "--gate-threshold")
    check_text_or_mixture(calibrate_on)
    measured: list[PackedSequence] = []

    def sequences_for(tokenizer: Tokenizer, config: SparseConfig) -> tuple[list[PackedSequence], ValidationSequences]:
        sequences, watched = text_or_mixture_calibration(
            calibrate_on,
            tokenizer,
            num_tokens=settings.calibration_tokens,
            validation_tokens=num_tokens,
            sequence_length=_sequence_length(config),
            seed=SEED,
            cache_dir=_cache(),
        )
        measured.extend(sequence for held_out in watched.values() for sequence in held_out)
        return sequences, watched

    converted, calibration = convert_calibrated(
        ModelSection(source=source),
        activation,
        settings,
        to,
        sequences_for,
        seed=0,  # nothing is drawn
        dtype=torch.bfloat16,
    )
    stages = calibration.stages if calibration else []
    measured_tokens = sum(len(sequence.input_ids) for sequence in measured)
    return Conversion(converted, f"held out of {calibrate_on}", measured_tokens, stages, calibration)


@dataclass(frozen=True)
class ConvertOptions:
    """The options of `sparsify convert` that decide how the model is converted.

    Attributes:
        activation: `--activation`; None for drelu with a method that replaces it, and for the model's own with every other.
        method: `--method`; None for the calibrated replacement, or for the bare one without `calibrate_on`.
        method_settings: `--set`, each KEY=VALUE.
    """

    activation: str | None = None
    gate_threshold: float | None = None
    method: str | None = None
    method_settings: Sequence[str] = ()
    refit: bool | None = None
    remainder: str | None = None
    allocation: str | None = None
    calibrate_on: str | None = None
    calibration_tokens: int | None = None
    target_zeros: float | None = None
    target_density: float | None = None
    weight_sparsity: float | None = None
    on: str | None = None


def conversion_settings(
    source: str, options: ConvertOptions
) -> tuple[ActivationSection, ConversionSection, str | None]:
    """The command's options as settings, and what to calibrate on; None for a bare replacement.

    Raises:
        ModelError: If the checkpoint must be read but is not readable.
        RecipeError: If an option would be ignored, or the method or its settings are not valid.
    """
    if options.calibrate_on is None and options.method is None:
        for name, value in (
            ("calibration-tokens", options.calibration_tokens),
            ("target-zeros", options.target_zeros),
            ("target-density", options.target_density),
            ("weight-sparsity", options.weight_sparsity),
            ("set", " ".join(options.method_settings) or None),
            ("refit", options.refit),
            ("remainder", options.remainder),
            ("allocation", options.allocation),
        ):
            if value is not None:
                raise RecipeError(
                    f"--{name} {value} would be ignored: nothing is calibrated.",
                    next_step="Give --calibrate-on or --method too, or omit it.",
                )
        activation = ActivationSection(options.activation or "drelu", options.gate_threshold)
        return activation, ConversionSection(), None
    if options.on is not None:
        raise RecipeError(
            f"--on {options.on} would be ignored: a calibrated replacement is measured on text held out of --calibrate-on.",
            next_step="Omit it.",
        )
    tokens = options.calibration_tokens
    settings = ConversionSection(
        calibration_tokens=CALIBRATION_TOKENS if tokens is None else tokens,
        target_zeros=options.target_zeros,
        target_density=options.target_density,
        weight_sparsity=options.weight_sparsity,
        method=options.method or ConversionSection().method,
        method_settings=dict(_setting(pair) for pair in options.method_settings),
        refit=options.refit,
        remainder=options.remainder or ConversionSection().remainder,
        allocation=options.allocation or ConversionSection().allocation,
    )
    check_conversion(settings)
    name, threshold = options.activation, options.gate_threshold
    if name is None:
        name = "drelu"
        method = method_of(settings)
        if isinstance(method, Mask | Upcycling) or not method.needs_new_activation:
            name, own_threshold = own_activation(source)
            threshold = own_threshold if threshold is None else threshold
    return ActivationSection(name, threshold), settings, options.calibrate_on or CALIBRATE_ON


def _setting(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not (key and equals):
        raise RecipeError(f"--set {pair} is not a setting.", allowed="KEY=VALUE, such as site=gate.")
    return key, yaml.safe_load(value)


def own_activation(source: str) -> tuple[str, float | None]:
    """Activation and gate threshold of a checkpoint; those of a stock one in a GGUF file."""
    path = locate(source)
    config = {} if path.is_file() else read_checkpoint(path).config
    name = stored_activation(config)
    has_threshold = name in ACTIVATIONS and ACTIVATIONS[name].has_gate_threshold
    return name, config.get("ffn_gate_threshold") if has_threshold else None


def _sequence_length(config: SparseConfig) -> int:
    return min(512, config.max_position_embeddings)


def _cache() -> Path:
    return Path(CACHE_DIR).expanduser()


def replacement_record(conversion: Conversion) -> dict[str, Any]:
    return {
        "folder": str(conversion.converted.folder),
        "ffn_activation": conversion.converted.config.ffn_activation,
        "sparsification": conversion.converted.config.sparsification,
        "weight_sparsity": conversion.converted.config.weight_sparsity,
        "quantisation": conversion.converted.config.quantisation,
        "text": conversion.text,
        "num_tokens": conversion.num_tokens,
        "stages": [asdict(stage) for stage in conversion.stages],
        "calibration_tokens": conversion.calibration.num_tokens if conversion.calibration else 0,
        "layers": conversion.calibration.layers if conversion.calibration else [],
    }


def replacement_table(conversion: Conversion) -> RenderableType:
    config = conversion.converted.config
    table = Table(
        f"{conversion.converted.folder}, {config.base_ffn_activation} to {config.ffn_activation}, "
        f"on {conversion.num_tokens:,} tokens: {conversion.text}",
        ["stage", "loss", "exact zeros"],
    )
    for stage in conversion.stages:
        table.add(stage.name, f"{stage.loss:.3f}", share(stage.zeros))
    calibration = conversion.calibration
    layers = [_layers(calibration)] if calibration and calibration.layers else []
    folder = conversion.converted.folder
    following = marked("Next: [cyan]sparsify train RECIPE model.source={}[/cyan]", folder)
    if config.quantisation:
        following = marked("Next: [cyan]sparsify report {}[/cyan]", folder)
    inputs = [site for site in site_rules(config) if site in COUNTED_SITES]
    where = marked("Zeros at {}: [cyan]sparsify report {}[/cyan]", ", ".join(inputs), folder)
    return Group("", table, *layers, *([where] if inputs else []), following)


def _layers(calibration: Calibration) -> RenderableType:
    found = [one for layer in calibration.layers for one in layer["experts"]]
    if any("error_quantised" in one for one in found):
        return _matrices(
            calibration, "Distance of the integer weights from the old ones, as a share of their norm", "quantised"
        )
    if any("weights" in one for one in found):
        return _matrices(calibration, "Weights that are exactly zero", "pruned")
    return _calibrated_layers(calibration)


def _matrices(calibration: Calibration, title: str, outcome: str) -> RenderableType:
    """A line for each layer: what became of each of its matrices, and the error of its block."""
    of_matrix = "zeros" if outcome == "pruned" else "error"
    table = Table(
        f"{title}, and relative error of the feed-forward outputs on held-out calibration tokens ({calibration.num_tokens:,} in total)",
        ["layer", *PROJECTIONS, "error", ""],
    )
    for layer in calibration.layers:
        matrices = {name: [found] for name, found in layer["attention"]["weights"].items()}
        for expert in layer["experts"]:
            for name, found in expert["weights"].items():
                matrices.setdefault(name, []).append(found)
        errors = [one for expert in layer["experts"] if (one := expert.get(f"error_{outcome}")) is not None]
        other = [f"{name} by {one['by']}" for name, found in matrices.items() for one in found if one["because"]]
        counted = [f"{times} × {name}" if times > 1 else name for name, times in Counter(other).items()]
        table.add(
            str(layer["layer"]),
            *(share(sum(one[of_matrix] for one in matrices[name]) / len(matrices[name])) for name in PROJECTIONS),
            f"{sum(errors) / len(errors):.3f}" if errors else "–",
            ", ".join(counted),
        )
    return table


def _calibrated_layers(calibration: Calibration) -> RenderableType:
    replaced = calibration.stages[1].name == BARE
    experts = [(layer, number, one) for layer in calibration.layers for number, one in enumerate(layer["experts"])]
    columns = {"error_bare": "activation alone" if replaced else "before the mask"}
    columns["error_before"] = "before the refit" if replaced else "with the mask"
    if any(one["error_refitted"] is not None for *_, one in experts):
        columns["error_refitted"] = "after the refit"
    table = Table(
        f"Relative error of the feed-forward outputs on held-out calibration tokens ({calibration.num_tokens:,} in total)",
        ["layer", *columns.values(), *(["sign flips"] if replaced else []), ""],
    )
    for layer, number, expert in experts:
        name = str(layer["layer"])
        table.add(
            f"{name}, expert {number}" if len(layer["experts"]) > 1 else name,
            *("–" if expert[key] is None else f"{expert[key]:.3f}" for key in columns),
            *([f"{expert['num_flipped']:,}"] if replaced else []),
            f"kept: {expert['kept_because']}" if expert["kept_because"] else "",
        )
    return table
