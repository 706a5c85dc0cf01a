"""From what a recipe's model section names to a checkpoint with the calibrated replacement, by way of the bare one.

Writes the checkpoint of a calibrated replacement: the bare replacement's shards with the tensors that calibration changed.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.convert import Converted, config_of, convert
from sparsify.conversion.manifest import record_folder
from sparsify.conversion.source_checkpoint import SourceCheckpoint, read_checkpoint
from sparsify.conversion.source_tensors import DTYPES, read_shapes
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.conversion.weight_files import in_dtype, write_index
from sparsify.errors import ModelError, RecipeError, StorageError
from sparsify.files import atomic_folder, replace_folder, write_json
from sparsify.metadata import holds_json, read_json, read_record
from sparsify.methods.allocation import allocate, damage_by_layer, probe_shares
from sparsify.methods.base import Mask, Upcycling, makes_masks, method_of, needs_new_activation, stored_by, upcycling_of
from sparsify.methods.calibrate import Calibration, Calibrator, rewrite_of
from sparsify.methods.calibrated_replacement import HELD_OUT_EVERY
from sparsify.methods.density import with_target_zeros
from sparsify.methods.upcycling import measured, write_upcycled
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.models import SparseConfig, site_rules
from sparsify.models.integer_linear import CODES, SCALES
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection

logger = logging.getLogger(__name__)


def write_calibrated(
    folder: Path,
    tensors_of: Callable[[int], Path],
    to: Path,
    *,
    config_fields: Mapping[str, Any],
    record: tuple[str, dict[str, Any]],
    dtype: torch.dtype | None = None,
) -> None:
    """Writes a checkpoint folder, a shard at a time: that of the bare replacement with the new tensors of each layer,
    the fields of config.json that the method changes, and a JSON file of that name and content. A mask's numbers are among
    the tensors. Integers take the place of the weight that they are. `dtype` is that of all other numbers; None leaves theirs.
    """
    checkpoint = read_checkpoint(folder)
    name = checkpoint.config["ffn_activation"]
    config = sparse_config(checkpoint.config, name, str(folder))
    for field, value in config_fields.items():
        setattr(config, field, value)
    homes = _homes(checkpoint, tensors_of, config.num_hidden_layers)
    with atomic_folder(to) as partial:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, partial / file.name)
        dtypes = [_rewrite(shard, homes[shard], partial, dtype) for shard in checkpoint.shards]
        write_index(partial, [shard.name for shard in checkpoint.shards])
        write_config(config, partial, dtypes[0])
        write_json(partial / record[0], record[1])
        record_folder(partial)


def _homes(
    checkpoint: SourceCheckpoint, tensors_of: Callable[[int], Path], num_layers: int
) -> dict[Path, dict[str, Path]]:
    """For each shard, the names of its new tensors and the files that they are in. Thresholds live with the first
    tensor of their layer.
    """
    shard_of = {name: shard for shard in checkpoint.shards for name in read_shapes(shard)}
    homes: dict[Path, dict[str, Path]] = {shard: {} for shard in checkpoint.shards}
    for layer in range(num_layers):
        file = tensors_of(layer)
        names = sorted(read_shapes(file))
        default = next(shard_of[_weight(name)] for name in names if _weight(name) in shard_of)
        for name in names:
            homes[shard_of.get(_weight(name), default)][name] = file
    return homes


def _weight(name: str) -> str:
    """The tensor whose place one of integers takes; itself if it is not one."""
    return name.removesuffix(CODES).removesuffix(SCALES) + "weight" if name.endswith((CODES, SCALES)) else name


def _rewrite(shard: Path, changed: dict[str, Path], folder: Path, dtype: torch.dtype | None) -> torch.dtype:
    tensors, converts = load_file(shard), dtype is not None
    dtype = dtype or next(iter(tensors.values())).dtype
    for file in set(changed.values()):
        new = load_file(file)
        tensors |= {name: new[name] for name, home in changed.items() if home == file}
    integers = {_weight(name): name for name in tensors if name.endswith(CODES)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in integers}
    if integers or converts:
        tensors = {name: in_dtype(name, tensor, dtype) for name, tensor in tensors.items()}
    save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    return dtype


def _stored_dtype(folder: Path) -> torch.dtype:
    return DTYPES[next(iter(read_checkpoint(folder).tensors.values())).dtype]


RECORD = "calibration.json"
"""In the folder of a calibrated checkpoint: what calibration found."""

SequencesFor = Callable[[Tokenizer, SparseConfig], tuple[Sequence[PackedSequence], Mapping[str, list[PackedSequence]]]]
"""(tokenizer, configuration) to the sequences to calibrate on, and those to watch with by source."""


def convert_calibrated(
    model: ModelSection,
    activation: ActivationSection,
    settings: ConversionSection,
    to: Path,
    sequences_for: SequencesFor,
    *,
    seed: int,
    dtype: torch.dtype,
    measure: bool = True,
) -> tuple[Converted, Calibration | None]:
    """Writes a checkpoint with the calibrated replacement. The same call resumes an interrupted one.

    `to` must not exist. A hidden folder next to it holds the state until then. `measure` as of a `Calibrator`.

    Returns:
        What was written and what was found; None for the latter where the activation stays and no thresholds are wanted.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held, or `to` exists.
        MixtureError: If there are too few sequences.
        StorageError: If the disk refuses.
    """
    if to.exists():
        raise ModelError(f"{to} exists already.", next_step="Choose another folder or remove this one.")
    check_fits(settings, model, activation)  # before anything is written
    upcycling = upcycling_of(settings)
    state = to.absolute().with_name(f".{to.name}.calibration")
    bare, asked = state / "bare", state / "asked.json"
    if settings.target_density is not None:
        settings = with_target_zeros(settings, config_of(model, activation))
    wanted = {
        "model": asdict(model),
        "activation": asdict(activation),
        "seed": seed,
        "drop_mask": settings.drop_source_mask,
    }
    if not holds_json(asked, wanted):
        shutil.rmtree(state, ignore_errors=True)
        write_json(asked, wanted)
    if bare.is_dir():
        config = _config(bare)
        converted = Converted(to, config, model.source or "")
    else:
        made = convert(model, activation, bare, seed=seed, dtype=dtype, drop_mask=settings.drop_source_mask)
        converted = Converted(to, made.config, made.origin)
    calibration = None
    if _has_nothing_to_do(converted.config, settings):
        logger.info(f"Nothing to calibrate: the model has {converted.config.ffn_activation} already")
        replace_folder(bare, to)
    elif converted.config.sparsification and (makes_masks(settings) or needs_new_activation(settings)):
        shutil.rmtree(state, ignore_errors=True)
        raise ModelError(
            f"{converted.origin} stores a mask already, of {converted.config.sparsification['method']}.",
            allowed="Masks are fitted to a model without one, and activations replaced in it.",
            next_step="Convert the dense model, or train this one as it is, without a calibration. A recipe can also leave "
            "that mask out: conversion.drop_source_mask=true.",
        )
    elif converted.config.weight_sparsity and (upcycling is not None or rewrite_of(settings).revives_zeros):
        shutil.rmtree(state, ignore_errors=True)
        raise ModelError(
            f"{converted.origin} has sparse weights, which {settings.method} would make dense: it reconstructs or rotates matrices.",
            allowed="Masks that change no weights (--no-refit, conversion.refit=false).",
            next_step="Convert the dense model first, then make its weights sparse: that keeps the mask.",
        )
    else:
        sequences, watched = sequences_for(load_tokenizer(bare), converted.config)
        if upcycling is not None:
            watched = watched if measure else {}
            calibration = write_upcycled(upcycling, bare, to, sequences, watched, RECORD)
            shutil.rmtree(state, ignore_errors=True)
            return Converted(to, _config(to), converted.origin), calibration
        shares = None
        if settings.allocation == "sensitivity":
            shares = _zeros_by_layer(bare, state, sequences, dict(watched), settings)
        source = rewrite_of(settings).prepared(bare, state / "prepared")
        calibrator = Calibrator(source, state, sequences, dict(watched), settings, shares, measure=measure)
        calibration = calibrator.run()
        write_calibrated(
            source,
            calibrator.tensors_of,
            to,
            config_fields=calibrator.method.config_fields,
            record=(RECORD, asdict(calibration)),
            dtype=None if source == bare else _stored_dtype(bare),
        )
        converted = Converted(to, _config(to), converted.origin)
        if converted.config.quantisation and measure:  # the layers' pass rounds no activations
            last = measured(settings.method, load_sparse(to, dtype=torch.float32), watched)
            calibration = replace(calibration, stages=[*(calibration.stages or []), last])
            write_json(to / RECORD, asdict(calibration))
            record_folder(to)
    shutil.rmtree(state, ignore_errors=True)
    return converted, calibration


def check_fits(settings: ConversionSection, model: ModelSection, activation: ActivationSection) -> None:
    """Refuses a method whose mask a model of that shape cannot have, or that makes no other architecture of it; no weights are read.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held.
        RecipeError: If there is no such method, or a setting of it is invalid, for any model or for this one.
    """
    upcycling = upcycling_of(settings)
    if upcycling is not None:
        upcycling.held_as(config_of(model, activation))
    method = method_of(settings)
    if not isinstance(method, Mask | Upcycling):
        config = config_of(model, activation)
        if settings.drop_source_mask:
            config.sparsification = None
        method.check_model(config)
    stored = stored_by(settings)
    if stored is None:
        return
    config = config_of(model, activation)
    config.sparsification = stored
    try:
        site_rules(config)
    except ValueError as error:
        raise RecipeError(
            f"{settings.method} does not fit this model: {error}.", next_step="Change the method's settings."
        ) from error


def _zeros_by_layer(
    bare: Path,
    state: Path,
    sequences: Sequence[PackedSequence],
    watched: dict[str, list[PackedSequence]],
    settings: ConversionSection,
) -> list[float]:
    """Each layer's share of zeros, by what masking it alone costs; measured once and kept in the state."""
    assert settings.target_zeros is not None
    file = state / "allocation.json"
    identity = hashlib.blake2b(repr(asdict(settings)).encode())
    for sequence in sequences:  # their bytes: numpy prints long arrays in part
        identity.update(sequence.input_ids.tobytes())
    digest = identity.hexdigest()
    if file.is_file() and (known := read_json(file, StorageError, f"Remove {state}.")).get("of") == digest:
        return known["zeros"]
    damages = []
    for share in probe_shares(settings.target_zeros):
        logger.info(f"Fitting the mask at {share:.1%} zeros, to measure what each layer's costs")
        folder = state / "allocation"
        plain = replace(settings, target_zeros=share, refit=False, allocation="uniform")
        calibrator = Calibrator(bare, folder / f"at-{share:.6f}", sequences, watched, plain, measure=False)
        calibrator.run()
        shutil.rmtree(folder / "model", ignore_errors=True)
        write_calibrated(
            bare,
            calibrator.tensors_of,
            folder / "model",
            config_fields=calibrator.method.config_fields,
            record=(RECORD, {"method": plain.method}),
        )
        damages.append(
            damage_by_layer(load_sparse(folder / "model").eval(), sequences[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        )
    shares = allocate(damages[0], damages[1], settings.target_zeros)
    logger.info(f"Zeros by layer: {', '.join(f'{share:.1%}' for share in shares)}")
    write_json(file, {"of": digest, "zeros": shares, "damages": damages})
    shutil.rmtree(state / "allocation", ignore_errors=True)
    return shares


def read_calibration(folder: Path) -> Calibration | None:
    """What the calibration of a converted model found; None if it had none. Raises ModelError if that is damaged."""
    path = folder / RECORD
    return read_record(path, Calibration, "the record of a calibration", ModelError) if path.is_file() else None


def _config(folder: Path) -> SparseConfig:
    config = read_checkpoint(folder).config
    return sparse_config(config, config["ffn_activation"], str(folder))


def _has_nothing_to_do(config: SparseConfig, settings: ConversionSection) -> bool:
    base = (config.base_ffn_activation, config.base_ffn_gate_threshold)
    same = (config.ffn_activation, config.ffn_gate_threshold) == base
    return same and needs_new_activation(settings)
