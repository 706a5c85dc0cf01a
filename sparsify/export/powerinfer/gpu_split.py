"""Activation statistics for PowerInfer, and the split of neurons between GPU (hot) and CPU (cold)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from sparsify.errors import ExportError
from sparsify.export.powerinfer.gguf import MAGIC
from sparsify.export.powerinfer.rules import SPLIT_NEURONS

ARCHITECTURE = "generic.gpu_index"
BYTES_PER_VALUE = {"f16": 2.0, "q4_0": 18 / 32}
I32_OF_POWERINFER = Type.IQ3_XXS
"""PowerInfer's number for 32-bit integers is 18, which is IQ3_XXS in current versions of the gguf package."""


def write_activations(counts: torch.Tensor, folder: Path) -> None:
    """Writes activation_{i}.pt for every layer: how often each neuron fired, float32 [neurons].

    Args:
        counts: How often each neuron fired, [layers, neurons].
        folder: Output folder, created if necessary.
    """
    folder.mkdir(parents=True)
    for layer, fired in enumerate(counts):
        torch.save(fired.float().contiguous().clone(), folder / f"activation_{layer}.pt")


def hot_neurons(counts: torch.Tensor, capacity_neurons: int) -> list[torch.Tensor]:
    """The neurons that fire most often, in groups of SPLIT_NEURONS per layer, up to the capacity.

    Args:
        counts: How often each neuron fired, [layers, neurons].
        capacity_neurons: Number of neurons that fit on the GPU.

    Returns:
        Sorted indices of the hot neurons of each layer.
    """
    often, order = counts.double().sort(dim=1, descending=True, stable=True)
    gains = often.unflatten(1, (-1, SPLIT_NEURONS)).sum(-1)
    groups = min(capacity_neurons // SPLIT_NEURONS, gains.numel())
    best = gains.flatten().sort(descending=True, stable=True).indices[:groups]
    # A layer's groups are sorted by gain, so its chosen groups are its first ones.
    chosen = torch.bincount(best // gains.shape[1], minlength=len(counts)) * SPLIT_NEURONS
    return [row[:number].sort().values for row, number in zip(order, chosen.tolist(), strict=True)]


def write_split(path: Path, counts: torch.Tensor, *, hidden: int, ffn_type: str, vram_bytes: int) -> list[int]:
    """Writes the file that places the hot neurons on the GPU and replaces the engine's solver.

    Args:
        path: Name of the model file plus `.generated.gpuidx`.
        counts: How often each neuron fired, [layers, neurons].
        hidden: Hidden size of the model.
        ffn_type: Type of the feed-forward weights.
        vram_bytes: GPU memory for neurons. The engine uses the file if its own budget is not smaller.

    Returns:
        Number of neurons of each layer on the GPU.

    Raises:
        ExportError: If the number of neurons is not a multiple of SPLIT_NEURONS.
    """
    num_layers, neurons = counts.shape
    if neurons % SPLIT_NEURONS:
        raise ExportError(
            f"intermediate_size is {neurons}: the engine moves neurons to a GPU in groups of {SPLIT_NEURONS}.",
            next_step="Omit --vram-gb; the file runs on the CPU.",
        )
    neuron_bytes = 3 * hidden * BYTES_PER_VALUE[ffn_type]
    hot = hot_neurons(counts, int(vram_bytes / neuron_bytes))
    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_block_count(num_layers)
    writer.add_uint64("split.vram_capacity", vram_bytes)
    for layer, indices in enumerate(hot):
        on_gpu = np.zeros(neurons, dtype=np.int32)
        on_gpu[indices.numpy()] = 1
        bucket = indices.numpy().astype(np.int32)
        writer.add_tensor(f"blk.{layer}.gpu_idx", on_gpu, raw_dtype=I32_OF_POWERINFER)
        writer.add_tensor(f"blk.{layer}.gpu_bucket", bucket, raw_dtype=I32_OF_POWERINFER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.write(MAGIC)
    return [len(indices) for indices in hot]
