"""From what a recipe's model section names to a checkpoint with the calibrated replacement, by way of the bare one.

Writes the checkpoint of a calibrated replacement: the bare replacement's shards with the tensors that calibration changed.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.convert import Converted, convert
from sparsify.conversion.source import SourceCheckpoint, read_checkpoint, read_shapes
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.tokenizer import load_tokenizer
from sparsify.errors import ModelError
from sparsify.files import atomic_folder, replace_folder, write_json
from sparsify.methods.base import Mask, makes_masks, method_of, sparsification
from sparsify.methods.calibrate import Calibration, Calibrator
from sparsify.mixture.sequences.reader import PackedSequence
from sparsify.mixture.tokens.encoder import Tokenizer
from sparsify.models import SparseConfig
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection, ConversionSection

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"


def write_calibrated(
    folder: Path,
    tensors_of: Callable[[int], Path],
    to: Path,
    *,
    mask: Mask | None,
    record: tuple[str, dict[str, Any]],
) -> None:
    """Writes a checkpoint folder, a shard at a time.

    Args:
        folder: The bare replacement's checkpoint.
        tensors_of: File with the new tensors of a layer, by their names on disk.
        to: Folder to write.
        mask: Its thresholds are among them; None for none.
        record: Name and content of a JSON file to write next to them.

    Raises:
        StorageError: If `to` cannot be written.
    """
    checkpoint = read_checkpoint(folder)
    name = checkpoint.config["ffn_activation"]
    config = sparse_config(checkpoint.config, name, str(folder))
    if mask is not None:
        config.sparsification = sparsification(mask)
    homes = _homes(checkpoint, tensors_of, config.num_hidden_layers)
    with atomic_folder(to) as partial:
        for file in folder.iterdir():
            if file.suffix != ".safetensors":
                shutil.copyfile(file, partial / file.name)
        dtypes = [_rewrite(shard, homes[shard], partial) for shard in checkpoint.shards]
        if (folder / INDEX).is_file():
            _write_index(folder / INDEX, homes, partial / INDEX)
        write_config(config, partial, dtypes[0])
        write_json(partial / record[0], record[1])


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
        default = next(shard_of[name] for name in names if name in shard_of)
        for name in names:
            homes[shard_of.get(name, default)][name] = file
    return homes


def _rewrite(shard: Path, changed: dict[str, Path], folder: Path) -> torch.dtype:
    tensors = load_file(shard)
    dtype = next(iter(tensors.values())).dtype
    for file in set(changed.values()):
        new = load_file(file)
        tensors |= {name: new[name] for name, home in changed.items() if home == file}
    save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    return dtype


def _write_index(old: Path, homes: dict[Path, dict[str, Path]], to: Path) -> None:
    index = json.loads(old.read_text(encoding="utf-8"))
    for shard, names in homes.items():
        index["weight_map"] |= dict.fromkeys(names, shard.name)
    write_json(to, index)


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
) -> tuple[Converted, Calibration | None]:
    """Writes a checkpoint with the calibrated replacement. The same call resumes an interrupted one.

    Args:
        model: Where the weights come from.
        activation: The activation to give it.
        settings: How to calibrate.
        to: Folder to write; must not exist. A hidden folder next to it holds the state until then.
        sequences_for: Gives the sequences.
        seed: Seed of an upcycled router.
        dtype: Dtype of weights that are built here; copied shards keep theirs.

    Returns:
        What was written and what was found; None for the latter where the activation stays and no thresholds are wanted.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held, or `to` exists.
        MixtureError: If there are too few sequences.
        StorageError: If the disk refuses.
    """
    if to.exists():
        raise ModelError(f"{to} exists already.", next_step="Choose another folder or remove this one.")
    method_of(settings)  # before anything is written
    state = to.absolute().with_name(f".{to.name}.calibration")
    bare, asked = state / "bare", state / "asked.json"
    wanted = {"model": asdict(model), "activation": asdict(activation), "seed": seed}
    if not asked.is_file() or json.loads(asked.read_text()) != wanted:
        shutil.rmtree(state, ignore_errors=True)
        write_json(asked, wanted)
    if bare.is_dir():
        config = _config(bare)
        converted = Converted(to, config, model.source or "")
    else:
        made = convert(model, activation, bare, seed=seed, dtype=dtype)
        converted = Converted(to, made.config, made.origin)
    calibration = None
    if _has_nothing_to_do(converted.config, settings):
        logger.info(f"Nothing to calibrate: the model has {converted.config.ffn_activation} already")
        replace_folder(bare, to)
    elif converted.config.sparsification:
        shutil.rmtree(state, ignore_errors=True)
        raise ModelError(
            f"{converted.origin} stores a mask already, of {converted.config.sparsification['method']}.",
            allowed="Methods start from a model without a mask.",
            next_step="Convert the dense model, or train this one as it is, without a calibration.",
        )
    else:
        sequences, watched = sequences_for(load_tokenizer(bare), converted.config)
        calibrator = Calibrator(bare, state, sequences, dict(watched), settings)
        calibration = calibrator.run()
        write_calibrated(
            bare,
            calibrator.tensors_of,
            to,
            mask=calibrator.method.mask,
            record=(RECORD, asdict(calibration)),
        )
        converted = Converted(to, _config(to), converted.origin)
    shutil.rmtree(state, ignore_errors=True)
    return converted, calibration


def read_record(folder: Path) -> dict[str, Any] | None:
    """What calibration found for a checkpoint; None where there was none."""
    path = folder / RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _config(folder: Path) -> SparseConfig:
    config = read_checkpoint(folder).config
    return sparse_config(config, config["ffn_activation"], str(folder))


def _has_nothing_to_do(config: SparseConfig, settings: ConversionSection) -> bool:
    base = (config.base_ffn_activation, config.base_ffn_gate_threshold)
    same = (config.ffn_activation, config.ffn_gate_threshold) == base
    return same and not makes_masks(settings)
