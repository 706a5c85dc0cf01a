"""From a dense checkpoint to one of another architecture, by a method that makes it; the whole model is in memory, in fp32."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsify.conversion.layout import tensor_shapes
from sparsify.conversion.manifest import MANIFEST, record_folder
from sparsify.conversion.source_checkpoint import INDEX, read_checkpoint
from sparsify.conversion.source_tensors import DTYPES, check_base_loss, check_tensors
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.errors import MixtureError
from sparsify.files import atomic_folder, write_json
from sparsify.methods.base import Upcycling
from sparsify.methods.calibrate import Calibration, CalibrationStage
from sparsify.mixture.sequences.reader import NO_LOSS, PackedSequence, collate
from sparsify.models import SparseModel


def write_upcycled(
    method: Upcycling,
    dense: Path,
    to: Path,
    sequences: Sequence[PackedSequence],
    watched: Mapping[str, list[PackedSequence]],
    record: str,
) -> Calibration:
    """Writes the model that a method makes of a dense checkpoint, in its dtype.

    Args:
        method: What makes it.
        dense: Folder of the checkpoint.
        to: Folder to write; it appears when all of it is written.
        sequences: To calibrate on.
        watched: Sequences that both models are measured on, by source; none for no measurement.
        record: Name of the JSON file in the folder that says what was found.

    Raises:
        MixtureError: If there are no calibration sequences.
        ModelError: If the dense model predicts no better than chance, or its loss is not a number.
        StorageError: If the disk refuses.
    """
    if not sequences:
        raise MixtureError(
            "There is no sequence to calibrate on.",
            allowed="At least one.",
            next_step="Give more calibration tokens, or a longer text.",
        )
    model = load_sparse(dense, dtype=torch.float32)
    stages = [measured("dense", model, watched)] if watched else []
    if stages:
        check_base_loss(stages[0].loss, "the dense model")
    dtype = DTYPES[next(iter(read_checkpoint(dense).tensors.values())).dtype]
    made: Any = method.upcycle(model, [collate([sequence]) for sequence in sequences])
    made.to(dtype)
    with atomic_folder(to) as partial:
        made.save_pretrained(partial)
        for file in dense.iterdir():
            if file.suffix not in (".safetensors", ".py") and file.name not in (MANIFEST, INDEX):
                shutil.copyfile(file, partial / file.name)
        write_config(made.config, partial, dtype)
        if watched:
            stages.append(measured(method.name, load_sparse(partial, dtype=torch.float32), watched))
        num_tokens = sum(len(sequence.input_ids) for sequence in sequences)
        calibration = Calibration(stages, [], num_tokens, method.name)
        write_json(partial / record, asdict(calibration))
        check_tensors(partial, read_checkpoint(partial).shapes, tensor_shapes(made.config))
        record_folder(partial)
    return calibration


@torch.no_grad()
def measured(name: str, model: SparseModel, watched: Mapping[str, list[PackedSequence]]) -> CalibrationStage:
    """Losses and exact zeros of a whole model."""
    losses: dict[str, float | None] = {}
    counts = torch.zeros(2, dtype=torch.int64)

    def count(_: nn.Module, args: object, product: torch.Tensor) -> None:
        counts.add_(torch.tensor([int((product == 0).sum()), product.numel()]))

    hooks = [block.ffn_activation.register_forward_hook(count) for block in model.ffn_blocks()]
    loss_sum, num_labels = 0.0, 0
    for source, sequences in watched.items():
        total, labels = 0.0, 0
        for sequence in sequences:
            batch = collate([sequence])
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            expected = batch["labels"].flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), expected, ignore_index=NO_LOSS, reduction="sum")
            total, labels = total + float(loss), labels + int((expected != NO_LOSS).sum())
        losses[source] = total / labels if labels else None
        loss_sum, num_labels = loss_sum + total, num_labels + labels
    for hook in hooks:
        hook.remove()
    zeros, values = counts.tolist()
    return CalibrationStage(name, losses, loss_sum / max(num_labels, 1), zeros / max(values, 1))
