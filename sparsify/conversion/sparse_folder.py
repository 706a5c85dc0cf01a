"""The sparse checkpoint folder: weights, configuration, and the code that gives them their meaning."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.dynamic_module_utils import get_relative_import_files

from sparsify.conversion.architecture import sparse_config, stored_activation
from sparsify.conversion.source_checkpoint import read_checkpoint
from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.models import Family, FfnActivation, SparseConfig, SparseModel, family_of, site_rules
from sparsify.models.masking import FACTOR_SITES, GROUP, is_in_activation, ranks_by_proxy


def write_config(config: SparseConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json with `auto_map`, and the modeling files that it points to.

    What older versions of transformers, and engines that read the file themselves, look for under other names is there too.
    """
    family = family_of(config)
    name = str(dtype).removeprefix("torch.")
    rope = config.rope_parameters
    fields = config.to_dict() | {
        "architectures": [family.model.__name__],
        "auto_map": auto_map(family),
        "dtype": name,
        "torch_dtype": name,
    }
    if "rope_theta" in rope:  # not where kinds of layers have positions of their own
        fields["rope_theta"] = rope["rope_theta"]
    if "rope_theta" in rope and rope.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    write_json(folder / "config.json", fields)
    for file in modeling_files(family):
        shutil.copyfile(file, folder / file.name)


def modeling_files(family: Family) -> list[Path]:
    """The files that define a family: its own, and those of this package that it imports."""
    own = sys.modules[family.module].__file__
    assert own is not None
    return [Path(own), *map(Path, get_relative_import_files(own))]


def auto_map(family: Family) -> dict[str, str]:
    """Where transformers finds the classes of a family, in the files next to config.json."""
    module = family.module.rpartition(".")[2]
    classes = {"AutoConfig": family.config, "AutoModel": family.decoder, "AutoModelForCausalLM": family.model}
    return {auto: f"{module}.{one.__name__}" for auto, one in classes.items()}


def load_sparse(
    folder: Path,
    ffn_activation: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    gate_threshold: float | None = None,
) -> SparseModel:
    """Loads a checkpoint folder as a sparse model: a sparse checkpoint, or a stock one that can be held.

    Activation, threshold and dtype are the stored ones unless given.

    Raises:
        ModelError: If the folder is not a whole checkpoint, is not supported, or any key is missing or unexpected.
    """
    checkpoint = read_checkpoint(folder)
    kept = stored_activation(checkpoint.config)
    config = sparse_config(checkpoint.config, ffn_activation or kept, str(folder), gate_threshold)
    # transformers reads the layout of our own folders. Here are read: what a stock one holds as one tensor, and a part of it.
    family = family_of(config)
    apart = checkpoint.config["model_type"] in family.stock and (family.fused or family.holders)
    state = {name: tensor.read() for name, tensor in checkpoint.tensors.items()} if apart else None
    try:
        model_class: Any = family.model
        model, info = model_class.from_pretrained(
            None if apart else folder,
            config=config,
            state_dict=state,
            dtype=dtype or "auto",
            output_loading_info=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (RuntimeError, ValueError, TypeError, LookupError, OSError) as error:
        raise ModelError(
            f"{folder} cannot be loaded: {str(error).strip().partition(chr(10))[0]}",
            next_step="Check that config.json and generation_config.json belong to these weights.",
        ) from error
    problems = {key: sorted(value) for key, value in info.items() if value}
    if problems:
        raise ModelError(
            f"{folder} did not load whole: {problems}.",
            allowed="Every tensor of the architecture, and none besides.",
        )
    check_activation(model, config.ffn_activation)
    return model.eval()


def check_activation(model: SparseModel, ffn_activation: str) -> None:
    """Guards against silent un-sparsification, as kernel patches that rebind a block's forward would cause it.

    Raises:
        RuntimeError: If any feed-forward block would not apply `ffn_activation`.
    """
    masked = site_rules(model.config)
    by_threshold = "inter" in masked and is_in_activation("inter", masked["inter"])
    in_activation = {site for site in FACTOR_SITES if site in masked and not (site == "inter" and by_threshold)}
    for block in model.ffn_blocks():
        own = "forward" not in vars(block) and type(block) is family_of(model.config).decoder.block_class
        activation = getattr(block, "ffn_activation", None)
        if (
            not own
            or not isinstance(activation, FfnActivation)
            # One that is on its way to another has factors of its own; one that a kernel computes has not.
            or type(activation).gate_factor is not FfnActivation.gate_factor
            or type(activation).up_factor is not FfnActivation.up_factor
            or activation.name != ffn_activation
            or activation.gate_threshold != model.config.ffn_gate_threshold
            or {site for site, mask in activation.masks.items() if mask is not None} != in_activation
            or (activation.threshold is not None) != by_threshold
            or (getattr(block, "input_mask", None) is not None) != ("ffn_in" in masked)
            or (getattr(block, "group_router", None) is not None) != (GROUP in masked)
            or block.by_proxy != ranks_by_proxy(masked)
        ):
            raise RuntimeError(f"{type(block).__name__} was patched: it does not apply {ffn_activation}")
