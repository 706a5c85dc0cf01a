"""Dense checkpoint → sparse-activated checkpoint, on disk.

An activation replacement changes no weight: the shards are copied as they are and config.json names the activation. So it needs no
memory to speak of, whatever the model's size. Upcycling, GGUF and random weights are built in memory.

Dense Mistral → Mixtral, without changing its function.
"""

from __future__ import annotations

import shutil
import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from sparsify.conversion.architecture import sparse_config, tensor_shapes
from sparsify.conversion.source import SourceCheckpoint, check_tensors, locate, read_checkpoint
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import check_tokenizer, copy_tokenizer, load_tokenizer
from sparsify.errors import ModelError
from sparsify.files import atomic_folder
from sparsify.models import (
    MODEL_CLASSES,
    SparseConfig,
    SparseMistralConfig,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseModel,
    mask_tensors,
)
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection

DENSE_ONLY_FIELDS = ("model_type", "architectures", "auto_map", "dtype", "transformers_version")


def check_dense(config: SparseConfig, num_experts: int) -> None:
    """Refuses to upcycle what has experts already.

    Raises:
        ModelError: If the configuration is that of a Mixtral.
    """
    if not isinstance(config, SparseMistralConfig):
        raise ModelError(
            f"model.upcycle_experts is {num_experts}, but the model is {config.model_type} already.",
            allowed="Only a dense model can be turned into one with experts.",
            next_step="Leave model.upcycle_experts out.",
        )


def upcycle(dense: SparseModel, num_experts: int, num_experts_per_token: int, seed: int) -> SparseMixtralForCausalLM:
    """Copies every feed-forward block into `num_experts` experts (sparse upcycling, arXiv 2212.05055).

    The router's weights are drawn at random; since Mixtral's router weights sum to 1 over the chosen experts and the
    experts are equal, the function is that of the dense model to rounding until training sets them apart.

    Raises:
        ModelError: If the model has experts already.
    """
    check_dense(dense.config, num_experts)
    fields = {key: value for key, value in dense.config.to_dict().items() if key not in DENSE_ONLY_FIELDS}
    config = SparseMixtralConfig(**fields, num_local_experts=num_experts, num_experts_per_tok=num_experts_per_token)
    torch.manual_seed(seed)
    model = SparseMixtralForCausalLM(config)
    model.to(dtype=dense.dtype)  # pyright: ignore[reportCallIssue]
    state, source = model.state_dict(), dense.state_dict()
    for key, value in source.items():
        if ".mlp." not in key:
            state[key].copy_(value)
    for layer in range(config.num_hidden_layers):
        old, new = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.mlp.experts."
        gate_up = torch.cat([source[f"{old}gate_proj.weight"], source[f"{old}up_proj.weight"]])
        state[f"{new}gate_up_proj"].copy_(gate_up.expand(num_experts, -1, -1))
        for site, (name, _) in mask_tensors(dense.config).items():
            target = state[f"model.layers.{layer}.{mask_tensors(config)[site][0]}"]
            target.copy_(source[f"model.layers.{layer}.{name}"].expand_as(target))
        state[f"{new}down_proj"].copy_(source[f"{old}down_proj.weight"].expand(num_experts, -1, -1))
    return model.eval()


TIED = "lm_head.weight"
"""Not stored when the embedding is tied, though some checkpoints have it."""
GGUF_MAGIC = b"GGUF"
GGUF_PACKAGES = ("gguf", "accelerate")
DERIVED = ".rotary_emb.inv_freq"
"""Stored by old Llama checkpoints, computed here."""


@dataclass(frozen=True)
class Converted:
    folder: Path
    config: SparseConfig
    origin: str


def convert(
    model: ModelSection,
    activation: ActivationSection,
    to: Path,
    *,
    seed: int,
    dtype: torch.dtype,
) -> Converted:
    """Writes the sparse-activated checkpoint that a recipe's model section describes.

    Args:
        model: Where the weights come from.
        activation: The activation to give it.
        to: Folder to write; must not exist.
        seed: Seed of random weights and of an upcycled router.
        dtype: Dtype of weights that are built here; copied shards keep theirs.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held.
        StorageError: If `to` cannot be written.
    """
    if to.exists():
        raise ModelError(f"{to} exists already.", next_step="Choose another folder or remove this one.")
    with atomic_folder(to) as partial:
        if model.init == "random":
            config = _write_random(model, activation, partial, seed, dtype)
            origin = f"random weights, seed {seed}"
        else:
            assert model.source is not None
            path = locate(model.source, model.revision)
            write = _write_gguf if path.is_file() else _write_replaced
            config = write(model, path, activation, partial)
            origin = model.source
        _check_tokenizer(model, config, partial, origin)
        if model.upcycle_experts is not None:
            config = _write_upcycled(model, partial, seed)
            origin += f", upcycled to {model.upcycle_experts} experts"
    return Converted(to, config, origin)


def _held_as(model: ModelSection, config: dict[str, Any], activation: ActivationSection, where: str) -> SparseConfig:
    name, gate_threshold = activation.ffn_activation, activation.model_gate_threshold
    held = sparse_config(config, name, where, gate_threshold)
    held.base_ffn_activation = config.get("ffn_activation", STOCK_ACTIVATION)
    held.base_ffn_gate_threshold = config.get("ffn_gate_threshold", 0.0)
    _check_architecture(model, config)
    if model.upcycle_experts is not None:
        check_dense(held, model.upcycle_experts)
    return held


def _check_tokenizer(model: ModelSection, config: SparseConfig, folder: Path, origin: str) -> None:
    where = model.tokenizer or origin
    check_tokenizer(load_tokenizer(folder, where), config, where)


def _tokenizer_folder(model: ModelSection, default: Path) -> Path:
    return default if model.tokenizer is None else locate(model.tokenizer)


def _write_replaced(model: ModelSection, path: Path, activation: ActivationSection, folder: Path) -> SparseConfig:
    checkpoint = read_checkpoint(path)
    config = _held_as(model, checkpoint.config, activation, str(path))
    expected = tensor_shapes(config)
    needless = {
        key
        for key in checkpoint.shapes.keys() - expected.keys()
        if key.endswith(DERIVED) or (key == TIED and config.tie_word_embeddings)
    }
    kept = {key: shape for key, shape in checkpoint.shapes.items() if key not in needless}
    check_tensors(SourceCheckpoint(path, checkpoint.config, checkpoint.shards, kept), expected)
    for shard in checkpoint.shards:
        if needless:
            tensors = {key: value for key, value in load_file(shard).items() if key not in needless}
            save_file(tensors, folder / shard.name, metadata={"format": "pt"})
        else:
            shutil.copyfile(shard, folder / shard.name)
    index = path / "model.safetensors.index.json"
    if index.is_file() and not needless:
        shutil.copyfile(index, folder / index.name)
    if (path / "generation_config.json").is_file():
        shutil.copyfile(path / "generation_config.json", folder / "generation_config.json")
    write_config(config, folder, _stored_dtype(checkpoint.shards[0]))
    copy_tokenizer(_tokenizer_folder(model, path), folder)
    return config


def _stored_dtype(shard: Path) -> torch.dtype:
    with safe_open(shard, framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def _check_architecture(model: ModelSection, config: dict[str, Any]) -> None:
    other = {
        key: (value, config[key])
        for key, value in model.architecture.items()
        if key in config and key not in ("model_type", "rope_parameters") and config[key] != value
    }
    if other:
        key, (wanted, found) = next(iter(other.items()))
        raise ModelError(
            f"{model.source} is not what the recipe expects: {key} is {found}, model.architecture says {wanted}.",
            next_step="Correct model.architecture, or give the checkpoint that the recipe means.",
        )


def _load_gguf(path: Path) -> PreTrainedModel:
    with path.open("rb") as file:
        if file.read(len(GGUF_MAGIC)) != GGUF_MAGIC:
            raise ModelError(
                f"{path} is a file, but no GGUF file.",
                allowed="A checkpoint folder or a GGUF file.",
            )
    missing = [name for name in GGUF_PACKAGES if find_spec(name) is None]
    if missing:
        raise ModelError(
            f"{path} is a GGUF file; reading one needs {' and '.join(missing)}, not installed here.",
            next_step=f"pip install {' '.join(missing)}",
        )
    try:
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    except (OSError, ValueError, struct.error) as error:
        raise ModelError(
            f"{path} is a GGUF file that cannot be read: {str(error).partition(chr(10))[0]}",
            next_step="Download or copy this file again, or give the safetensors checkpoint that it was made from.",
        ) from error


def _write_gguf(model: ModelSection, path: Path, activation: ActivationSection, folder: Path) -> SparseConfig:
    dense = _load_gguf(path)
    fields = dense.config.to_dict()
    fields.pop("quantization_config", None)  # it says how the file was; what was loaded is full precision
    config = _held_as(model, fields, activation, path.name)
    sparse = MODEL_CLASSES[config.model_type](config).to(torch.bfloat16)
    sparse.load_state_dict(dense.state_dict(), strict=True)
    sparse.save_pretrained(folder)
    write_config(config, folder, torch.bfloat16)
    if model.tokenizer is None:
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    else:
        copy_tokenizer(locate(model.tokenizer), folder)
    return config


def _write_random(
    model: ModelSection, activation: ActivationSection, folder: Path, seed: int, dtype: torch.dtype
) -> SparseConfig:
    assert model.tokenizer is not None
    config = _held_as(model, dict(model.architecture), activation, "model.architecture")
    torch.manual_seed(seed)
    MODEL_CLASSES[config.model_type](config).to(dtype).save_pretrained(folder)
    write_config(config, folder, dtype)
    copy_tokenizer(locate(model.tokenizer), folder)
    return config


def _write_upcycled(model: ModelSection, folder: Path, seed: int) -> SparseConfig:
    assert model.upcycle_experts is not None
    dense = load_sparse(folder)
    sparse = upcycle(dense, model.upcycle_experts, model.upcycle_experts_per_token, seed)
    for file in [*folder.glob("*.safetensors*"), *folder.glob("*sparse_mistral.py")]:
        file.unlink()
    sparse.save_pretrained(folder)
    write_config(sparse.config, folder, sparse.dtype)
    return sparse.config
