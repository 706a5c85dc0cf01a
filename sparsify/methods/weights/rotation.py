"""Rotation of a model by orthogonal matrices that its norms and its attention let through: it computes the same, without outliers.

QuaRot, arXiv 2404.00456; RRS, arXiv 2409.20361. The factors of the norms in front of attention, feed-forward block and output layer
are folded into what reads them; then x ↦ x Q, with Q = diag(random signs) · Hadamard, turns the residual stream: Q is in the weights
that write it (embedding, o, down) and its inverse in those that read it (q, k, v, gate, up, routers, output layer). Within each head
v writes, and o reads, values times a Hadamard matrix. Nothing of this is computed while the model runs. What is: in front of down, and of o
where heads are mixed too (`turns_heads`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.layout import LAYER, name_on_disk, projection_names, tensor_shapes
from sparsify.conversion.manifest import MANIFEST, record_folder
from sparsify.conversion.source_checkpoint import INDEX, read_checkpoint
from sparsify.conversion.source_tensors import EMBEDDING, HEAD
from sparsify.conversion.sparse_folder import write_config
from sparsify.conversion.weight_files import write_shards
from sparsify.errors import RecipeError
from sparsify.files import atomic_folder
from sparsify.models import Family, SparseConfig, family_of, site_rules
from sparsify.models.hadamard import core_order, multiply
from sparsify.models.masking import FACTOR_SITES, has_experts, head_size, num_neurons

READS_ATTENTION_NORM = ("q_proj", "k_proj", "v_proj")
READS_FFN_NORM = ("gate_proj", "up_proj")
FINAL_NORM = "model.norm.weight"
SEED = 0
"""Of the random signs."""


def check_rotation(config: SparseConfig, *, down: bool) -> None:
    """Refuses a model that would not compute the same when it is rotated.

    Args:
        config: Of the model.
        down: Whether the input of down is rotated, too.

    Raises:
        RecipeError: With the reason.
    """
    reason = _family_obstacle(family_of(config)) or _mask_obstacle(config) or _size_obstacle(config, down=down)
    if reason:
        raise RecipeError(
            f"A {config.model_type} model cannot be rotated: {reason}.",
            allowed="Models with norms in front of attention and feed-forward block only, without a mask on what these read.",
            next_step="Set rotate=none (--set rotate=none), or choose another model.",
        )


def _family_obstacle(family: Family) -> str:
    if family.layer_difference:
        return f"it has {family.layer_difference}, which a rotation mixes"
    if family.attention_norm is None or family.ffn_norm is None:
        return "its attention and its feed-forward block read the residual stream without a norm, and norms are behind them"
    behind = [name for name in (family.attention_output_norm, family.ffn_output_norm) if name is not None]
    if behind:
        return (
            f"the norms behind its blocks ({', '.join(behind)}) have a factor for each channel, which a rotation mixes"
        )
    return ""


def _mask_obstacle(config: SparseConfig) -> str:
    for site, rule in site_rules(config).items():
        if site not in FACTOR_SITES:
            return f"its mask chooses elements of {site}, which a rotation mixes"
        if rule.by_proxy:
            return "its mask ranks neurons by int4 copies of weights, which a rotation changes"
        if rule.remainder != "none":
            return "its mask adds a remainder to the residual stream"
    return ""


def _size_obstacle(config: SparseConfig, *, down: bool) -> str:
    sizes = {"hidden_size": config.hidden_size, "the size of a head": head_size(config)}
    if down:
        sizes["the number of neurons"] = num_neurons(config)
    for name, size in sizes.items():
        if core_order(size) is None:
            return (
                f"{name} is {size}, and there is no Hadamard matrix of that size here (K · 2^m, see models/hadamard.py)"
            )
    return ""


def turns_heads(config: SparseConfig) -> bool:
    """Whether heads are mixed, too, in front of o while the model runs: where their number allows it, and is not 1."""
    heads = config.num_attention_heads
    return heads > 1 and core_order(heads) is not None


def rotate_checkpoint(folder: Path, to: Path) -> None:
    """Writes a rotated checkpoint, in fp32 and with an output layer of its own, that computes what the one in `folder` does.

    A tensor in memory at a time, besides the embedding. The caller has called `check_rotation`.
    """
    checkpoint = read_checkpoint(folder)
    config = sparse_config(checkpoint.config, stored_activation(checkpoint.config), str(folder))
    turned = TurnedTensors(config, {name: tensor.read for name, tensor in checkpoint.tensors.items()})
    config.tie_word_embeddings = False
    with atomic_folder(to) as partial:
        write_shards(tensor_shapes(config), torch.float32, turned.read, partial)
        for file in folder.iterdir():
            if file.suffix not in (".safetensors", ".py") and file.name not in (MANIFEST, INDEX):
                shutil.copyfile(file, partial / file.name)
        write_config(config, partial, torch.float32)
        record_folder(partial)


class TurnedTensors:
    """Reads the tensors of a rotated model, computed in float64 from those of the model as it is.

    Args:
        config: Of the model as it is.
        stored: Reads its tensors, by their names on disk.
    """

    def __init__(self, config: SparseConfig, stored: Mapping[str, Callable[[], torch.Tensor]]) -> None:
        self._config, self._family, self._stored = config, family_of(config), stored
        self._head_size = head_size(config)
        generator = torch.Generator().manual_seed(SEED)
        self._signs = torch.randint(0, 2, (config.hidden_size,), generator=generator).double() * 2 - 1
        self._norms = {FINAL_NORM}
        self._reads: dict[str, str] = {HEAD: FINAL_NORM}
        self._writes, self._values, self._outputs = set[str](), set[str](), set[str]()
        for layer in range(config.num_hidden_layers):
            self._add_layer(layer)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the rotated model in fp32, by its name on disk."""
        if name in self._norms:
            own = self._stored[name]()
            return torch.zeros_like(own, dtype=torch.float32) if self._family.unit_offset else torch.ones(own.shape)
        source = EMBEDDING if name == HEAD and HEAD not in self._stored else name
        tensor = self._stored[source]()
        if name == EMBEDDING:
            return self._turn(tensor.double()).float()
        if name in self._values and tensor.dim() == 1:  # its bias
            return multiply(tensor.double().unflatten(0, (-1, self._head_size))).flatten().float()
        if name in self._reads:
            tensor = self._turn(tensor.double() * self._factors(self._reads[name]))
        if name in self._values:
            tensor = multiply(tensor.unflatten(0, (-1, self._head_size)), 1).flatten(0, 1)
        if name in self._outputs:
            tensor = multiply(tensor.double().unflatten(1, (-1, self._head_size))).flatten(1)
        if name in self._writes:
            tensor = self._turn(tensor.double().T).T
        return tensor.float().contiguous()

    def _add_layer(self, layer: int) -> None:
        prefix, config = LAYER.format(layer), self._config
        attention, ffn = (f"{prefix}{norm}.weight" for norm in (self._family.attention_norm, self._family.ffn_norm))
        self._norms |= {attention, ffn}
        for norm, projections in ((attention, READS_ATTENTION_NORM), (ffn, READS_FFN_NORM)):
            self._reads |= {name: norm for one in projections for name in projection_names(config, layer, one)}
        if has_experts(config):
            self._reads[name_on_disk(config, f"{prefix}mlp.gate.weight")] = ffn
        (value,), (output,) = (projection_names(config, layer, one) for one in ("v_proj", "o_proj"))
        self._values |= {value, value.replace(".weight", ".bias")}
        self._outputs.add(output)
        self._writes |= {output, *projection_names(config, layer, "down_proj")}

    def _turn(self, rows: torch.Tensor) -> torch.Tensor:
        return multiply(rows * self._signs)

    def _factors(self, norm: str) -> torch.Tensor:
        return self._stored[norm]().double() + (1.0 if self._family.unit_offset else 0.0)
