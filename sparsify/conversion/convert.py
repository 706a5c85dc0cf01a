"""Dense checkpoint → sparse-activated checkpoint, on disk.

An activation replacement changes no weight: the shards are copied and config.json names the activation; where they are stored in
another layout, or hold needless tensors, they are rewritten one at a time. So it needs memory for at most one shard, whatever the
model's size, from a GGUF file too. Upcycling and random weights are built in memory.

Dense Mistral → Mixtral, without changing its function.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from sparsify.conversion.architecture import refuse_integers, sparse_config, stored_activation
from sparsify.conversion.gguf_file import gguf_tokenizer, read_gguf
from sparsify.conversion.layout import mask_names, projection_names, tensor_shapes
from sparsify.conversion.manifest import record_folder
from sparsify.conversion.source_checkpoint import SourceCheckpoint, locate, read_checkpoint
from sparsify.conversion.source_tensors import DTYPES, HEAD, check_finite, check_tensors
from sparsify.conversion.sparse_folder import load_sparse, write_config
from sparsify.conversion.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer, write_tokenizer
from sparsify.conversion.weight_files import copy_shards, write_shards
from sparsify.errors import ModelError
from sparsify.files import atomic_folder
from sparsify.models import (
    SparseConfig,
    SparseMixtralConfig,
    SparseMixtralForCausalLM,
    SparseModel,
    family_of,
    mask_tensors,
    site_rules,
)
from sparsify.models.masking import READERS, has_experts
from sparsify.recipe.model import ModelSection
from sparsify.recipe.sparsification import ActivationSection

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"
UPCYCLED = ("sparse_mistral", "sparse_llama")
"""Model types whose layers are Mixtral's but for the experts."""
DENSE_ONLY_FIELDS = ("model_type", "architectures", "auto_map", "dtype", "transformers_version")


def check_dense(config: SparseConfig, num_experts: int) -> None:
    """Raises ModelError if what is to be upcycled has experts already."""
    if has_experts(config):
        raise ModelError(
            f"model.upcycle_experts is {num_experts}, but the model is {config.model_type} already.",
            allowed="Only a dense model can be turned into one with experts.",
            next_step="Leave model.upcycle_experts out.",
        )
    if config.model_type not in UPCYCLED:
        raise ModelError(
            f"model.upcycle_experts is {num_experts}, and the model is {config.model_type}: Mixtral's attention is another.",
            allowed=f"{', '.join(UPCYCLED)}.",
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
    config = _upcycled_config(dense.config, num_experts, num_experts_per_token)
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
        targets = mask_tensors(config)
        for site, parts in mask_tensors(dense.config).items():
            for part, (name, _) in parts.items():
                target = state[f"model.layers.{layer}.{targets[site][part][0]}"]
                target.copy_(source[f"model.layers.{layer}.{name}"].expand_as(target))
        state[f"{new}down_proj"].copy_(source[f"{old}down_proj.weight"].expand(num_experts, -1, -1))
    return model.eval()


def _upcycled_config(dense: SparseConfig, num_experts: int, num_experts_per_token: int) -> SparseMixtralConfig:
    fields = {key: value for key, value in dense.to_dict().items() if key not in DENSE_ONLY_FIELDS}
    return SparseMixtralConfig(**fields, num_local_experts=num_experts, num_experts_per_tok=num_experts_per_token)


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
    drop_mask: bool = False,
) -> Converted:
    """Writes the sparse-activated checkpoint that a recipe's model section describes.

    Args:
        model: Where the weights come from.
        activation: The activation to give it.
        to: Folder to write; must not exist.
        seed: Seed of random weights and of an upcycled router.
        dtype: Dtype of weights that are built here; copied shards keep theirs.
        drop_mask: Remove the mask that the source stores.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held, or has no mask to remove.
        StorageError: If `to` cannot be written.
    """
    with conversion(model, activation, to, seed=seed, dtype=dtype, drop_mask=drop_mask) as made:
        pass
    return replace(made, folder=to)


def config_of(model: ModelSection, activation: ActivationSection) -> SparseConfig:
    """The configuration of the checkpoint that `convert` writes; no weights are read.

    Raises:
        ModelError: If the source is missing, damaged, or cannot be held.
    """
    if model.init == "random":
        config, where = dict(model.architecture), "model.architecture"
    else:
        assert model.source is not None
        path = locate(model.source, model.revision)
        where = str(path)
        config = read_gguf(path).config if path.is_file() else read_checkpoint(path).config
    held = _held_as(model, config, activation, where)
    if model.upcycle_experts is None:
        return held
    return _upcycled_config(held, model.upcycle_experts, model.upcycle_experts_per_token)


@contextmanager
def conversion(
    model: ModelSection,
    activation: ActivationSection,
    to: Path,
    *,
    seed: int,
    dtype: torch.dtype,
    drop_mask: bool = False,
) -> Iterator[Converted]:
    """Like `convert`, for what must succeed before the result may be seen: the checkpoint has a temporary name in the
    block, and is removed if the block fails.
    """
    if to.exists():
        raise ModelError(f"{to} exists already.", next_step="Choose another folder or remove this one.")
    with atomic_folder(to) as partial:
        path, origin = None, f"random weights, seed {seed}"
        if model.init != "random":
            assert model.source is not None
            path, origin = locate(model.source, model.revision), model.source
        config, has_mask = _write(model, path, activation, partial, seed, dtype, drop_mask=drop_mask)
        if drop_mask and not has_mask:
            raise ModelError(
                f"conversion.drop_source_mask=true would be ignored: {origin} stores no mask.",
                next_step="Omit it.",
            )
        where = model.tokenizer or origin
        check_tokenizer(load_tokenizer(partial, where), config, where)
        if model.upcycle_experts is not None:
            config = _write_upcycled(model, partial, seed)
            origin += f", upcycled to {model.upcycle_experts} experts"
        check_tensors(partial, read_checkpoint(partial).shapes, tensor_shapes(config))
        record_folder(partial)
        yield Converted(partial, config, origin)


def _write(
    model: ModelSection,
    path: Path | None,
    activation: ActivationSection,
    folder: Path,
    seed: int,
    dtype: torch.dtype,
    *,
    drop_mask: bool,
) -> tuple[SparseConfig, bool]:
    """Writes the checkpoint without upcycling; the second result says whether the source stores a mask."""
    if path is None:
        return _write_random(model, activation, folder, seed, dtype), False
    if path.is_file():
        return _write_gguf(model, path, activation, folder), False
    return _write_replaced(model, path, activation, folder, drop_mask=drop_mask)


def _held_as(model: ModelSection, config: dict[str, Any], activation: ActivationSection, where: str) -> SparseConfig:
    refuse_integers(config, where)
    name, gate_threshold = activation.ffn_activation, activation.model_gate_threshold
    held = sparse_config(config, name, where, gate_threshold)
    held.base_ffn_activation = stored_activation(config)
    held.base_ffn_gate_threshold = config.get("ffn_gate_threshold", 0.0)
    _check_architecture(model, config)
    if model.upcycle_experts is not None:
        check_dense(held, model.upcycle_experts)
    return held


def _write_replaced(
    model: ModelSection, path: Path, activation: ActivationSection, folder: Path, *, drop_mask: bool
) -> tuple[SparseConfig, bool]:
    checkpoint = read_checkpoint(path)
    for note in checkpoint.notes:
        logger.info(note)
    config = _held_as(model, checkpoint.config, activation, str(path))
    stored, has_mask = tensor_shapes(config), bool(config.sparsification)
    turned = _turned_by(config) if drop_mask else {}
    if drop_mask:
        config.sparsification = None
    if turned:  # no zero survives a rotation
        config.weight_sparsity = None
    expected = tensor_shapes(config)
    needless = stored.keys() - expected.keys()
    if config.tie_word_embeddings:
        needless |= {HEAD}  # equal to the embedding
    kept = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in needless}
    check_tensors(path, {name: tensor.shape for name, tensor in kept.items()}, expected)
    copy_shards(checkpoint.shards, kept, folder)
    _turn_back(checkpoint, turned, folder)
    if (path / GENERATION).is_file():
        shutil.copyfile(path / GENERATION, folder / GENERATION)
    write_config(config, folder, _dtype(checkpoint))
    write_tokenizer(path if model.tokenizer is None else locate(model.tokenizer), folder)
    return config, has_mask


def _turned_by(config: SparseConfig) -> dict[str, str]:
    """The weights that hold the inverse of a mask's rotation, each with the name of the rotation; names on disk."""
    found = {}
    for site in (site for site, rule in site_rules(config).items() if rule.rotated):
        for layer in range(config.num_hidden_layers):
            for projection in READERS[site]:
                names = projection_names(config, layer, projection)
                found |= dict.fromkeys(names, mask_names(config, layer)[site]["basis"])
    return found


def _turn_back(checkpoint: SourceCheckpoint, turned: Mapping[str, str], folder: Path) -> None:
    """Takes a mask's rotations out of the weights that were copied; a file at a time in memory."""
    for file in sorted(folder.glob("*.safetensors")) if turned else ():
        tensors = load_file(file)
        for name in tensors.keys() & turned.keys():
            basis = checkpoint.tensors[turned[name]].read().double()
            tensors[name] = (tensors[name].double() @ basis.T).to(tensors[name].dtype).contiguous()
        save_file(tensors, file, metadata={"format": "pt"})


def _dtype(checkpoint: SourceCheckpoint) -> torch.dtype:
    """The dtype that transformers would load: the configuration's, otherwise that of the first tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    stored = next(iter(checkpoint.tensors.values())).dtype
    named_dtypes = DTYPES | {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    return named_dtypes.get(str(named)) or DTYPES[stored]


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


def _write_gguf(model: ModelSection, path: Path, activation: ActivationSection, folder: Path) -> SparseConfig:
    source = read_gguf(path)
    config = _held_as(model, source.config, activation, path.name)
    shapes = tensor_shapes(config)
    check_tensors(path, {name: tensor.shape for name, tensor in source.tensors.items()}, shapes)

    def read(name: str) -> torch.Tensor:
        values = source.tensors[name].read()
        check_finite(name, [values])
        return values.to(source.dtype)

    write_shards(shapes, source.dtype, read, folder)
    write_config(config, folder, source.dtype)
    if model.tokenizer is None:
        save_tokenizer(gguf_tokenizer(path), folder)
    else:
        write_tokenizer(locate(model.tokenizer), folder)
    return config


def _write_random(
    model: ModelSection, activation: ActivationSection, folder: Path, seed: int, dtype: torch.dtype
) -> SparseConfig:
    assert model.tokenizer is not None
    config = _held_as(model, dict(model.architecture), activation, "model.architecture")
    torch.manual_seed(seed)
    made: Any = family_of(config).model(config)
    made.to(dtype).save_pretrained(folder)
    write_config(config, folder, dtype)
    write_tokenizer(locate(model.tokenizer), folder)
    return config


def _write_upcycled(model: ModelSection, folder: Path, seed: int) -> SparseConfig:
    assert model.upcycle_experts is not None
    dense = load_sparse(folder)
    sparse = upcycle(dense, model.upcycle_experts, model.upcycle_experts_per_token, seed)
    for file in [*folder.glob("*.safetensors*"), *folder.glob("*.py")]:
        file.unlink()
    sparse.save_pretrained(folder)
    write_config(sparse.config, folder, sparse.dtype)
    return sparse.config
