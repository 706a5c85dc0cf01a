"""Which neurons a GPU holds: activation statistics, and the split file that replaces PowerInfer's solver."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from sparsify.errors import ExportError
from sparsify.export.powerinfer.gguf import BYTES_PER_VALUE, MAGIC, Facts, Sizes
from sparsify.export.powerinfer.rules import SPLIT_NEURONS
from sparsify.models import SparseConfig

SPLIT_ARCHITECTURE = "generic.gpu_index"
ENGINE_CONTEXT = 512
"""The context that the engine reserves memory for unless `-c` says another."""
I32_OF_POWERINFER = Type.IQ3_XXS
"""PowerInfer's number for 32-bit integers is 18, which is IQ3_XXS in current versions of the gguf package."""


def check_split(config: SparseConfig) -> None:
    """Raises ExportError if the engine cannot split a model's neurons between CPU and GPU."""
    if config.intermediate_size % SPLIT_NEURONS:
        raise ExportError(
            f"intermediate_size is {config.intermediate_size}: the engine moves neurons to a GPU in groups of {SPLIT_NEURONS}.",
            next_step="Omit --vram-gb; the file runs on the CPU.",
        )


def write_activations(counts: torch.Tensor, folder: Path) -> None:
    """Writes activation_{i}.pt for every layer from counts [layers, neurons]: how often each neuron fired, float32
    [neurons].
    """
    folder.mkdir(parents=True)
    for layer, fired in enumerate(counts):
        torch.save(fired.float().contiguous().clone(), folder / f"activation_{layer}.pt")


def hot_neurons(counts: torch.Tensor, capacity_neurons: int) -> list[torch.Tensor]:
    """Sorted indices of each layer's neurons that fire most often, by counts [layers, neurons], in groups of
    SPLIT_NEURONS up to the capacity.
    """
    often, order = counts.double().sort(dim=1, descending=True, stable=True)
    gains = often.unflatten(1, (-1, SPLIT_NEURONS)).sum(-1)
    groups = min(capacity_neurons // SPLIT_NEURONS, gains.numel())
    best = gains.flatten().sort(descending=True, stable=True).indices[:groups]
    # A layer's groups are sorted by gain, so its chosen groups are its first ones.
    chosen = torch.bincount(best // gains.shape[1], minlength=len(counts)) * SPLIT_NEURONS
    return [row[:number].sort().values for row, number in zip(order, chosen.tolist(), strict=True)]


def vram_budget(config: SparseConfig, sizes: Sizes, hot_bytes: int, context_tokens: int) -> float:
    """The smallest --vram-budget with which the engine uses a split, in GiB, rounded up.

    Before the hot neurons the engine moves attention, norms, predictors, head and the cache of keys and values (F16) of the
    whole context to the GPU. The embedding stays in the CPU's memory.
    """
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head * context_tokens
    return math.ceil((sizes.on_gpu + cache + hot_bytes) / 2**30 * 1000) / 1000


def write_split(
    path: Path, counts: torch.Tensor, config: SparseConfig, sizes: Sizes, facts: Facts, vram_bytes: int
) -> list[str]:
    """Writes the file that places the hot neurons on the GPU, up to `vram_bytes`, and replaces the engine's solver; returns
    notes for the user.

    The engine uses the file if the bytes that it names fit in what is left of its budget after everything else that it moves to
    the GPU. So it names those of the hot neurons, and no more.
    """
    num_layers, neurons = counts.shape
    neuron_bytes = 3 * config.hidden_size * BYTES_PER_VALUE[facts.ffn_type]
    hot = hot_neurons(counts, int(vram_bytes / neuron_bytes))
    hot_bytes = round(sum(map(len, hot)) * neuron_bytes)
    writer = GGUFWriter(path, SPLIT_ARCHITECTURE)
    writer.add_block_count(num_layers)
    writer.add_uint64("split.vram_capacity", hot_bytes)
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
    budgets = {
        tokens: vram_budget(config, sizes, hot_bytes, tokens) for tokens in (ENGINE_CONTEXT, facts.context_tokens)
    }
    return [
        f"Neurons on the GPU, layer by layer: {', '.join(str(len(indices)) for indices in hot)}; {hot_bytes / 1e9:.3f} GB.",
        "PowerInfer uses the split with at least "
        + " or ".join(f"`--vram-budget {budget:.3f}` at `-c {tokens}`" for tokens, budget in budgets.items())
        + " (GiB): attention, predictors, head and cache come first.",
    ]
