"""The sparse checkpoint folder: weights, configuration, and the code that gives them their meaning."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from sparsify import models
from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.source import read_checkpoint
from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.models import MODEL_CLASSES, FfnActivation, SparseConfig, SparseModel, site_rules
from sparsify.models.activations import STOCK_ACTIVATION
from sparsify.models.modeling_sparse_mistral import SparseMistralMLP
from sparsify.models.modeling_sparse_mixtral import SparseMixtralExperts


def write_config(config: SparseConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json with `auto_map`, and the modeling files that it points to."""
    kind = config.model_type
    config_file, model_file = f"configuration_{kind}", f"modeling_{kind}"
    model_class, config_class = MODEL_CLASSES[kind].__name__, type(config).__name__
    fields = config.to_dict() | {
        "architectures": [model_class],
        "auto_map": {
            "AutoConfig": f"{config_file}.{config_class}",
            "AutoModelForCausalLM": f"{model_file}.{model_class}",
        },
        "dtype": str(dtype).removeprefix("torch."),
    }
    write_json(folder / "config.json", fields)
    for name in (config_file, model_file, "ffn_activation", "activations", "masking"):
        shutil.copyfile(Path(models.__file__).with_name(f"{name}.py"), folder / f"{name}.py")


def load_sparse(
    folder: Path,
    ffn_activation: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    gate_threshold: float | None = None,
) -> SparseModel:
    """Loads a checkpoint folder as a sparse model: a sparse checkpoint, or a stock one that can be held.

    Args:
        folder: Checkpoint folder.
        ffn_activation: Activation to load it with; the folder's own unless given (STOCK_ACTIVATION for a stock checkpoint).
        dtype: Dtype of the weights; the stored one unless given.
        gate_threshold: Of that activation; the folder's own unless given.

    Raises:
        ModelError: If the folder is not a whole checkpoint, is not supported, or any key is missing or unexpected.
    """
    checkpoint = read_checkpoint(folder)
    kept = checkpoint.config.get("ffn_activation", STOCK_ACTIVATION)
    config = sparse_config(checkpoint.config, ffn_activation or kept, str(folder), gate_threshold)
    model, info = MODEL_CLASSES[config.model_type].from_pretrained(
        folder, config=config, dtype=dtype or "auto", output_loading_info=True
    )
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
    for block in model.ffn_blocks():
        own = "forward" not in vars(block) and type(block) in (
            SparseMistralMLP,
            SparseMixtralExperts,
        )
        activation = getattr(block, "ffn_activation", None)
        if (
            not own
            or not isinstance(activation, FfnActivation)
            # One that is on its way to another has factors of its own; one that a kernel computes has not.
            or type(activation).gate_factor is not FfnActivation.gate_factor
            or type(activation).up_factor is not FfnActivation.up_factor
            or activation.name != ffn_activation
            or activation.gate_threshold != model.config.ffn_gate_threshold
            or (activation.threshold is not None) != ("inter" in masked)
            or (activation.gate_mask is not None) != ("gate" in masked)
            or (getattr(block, "input_mask", None) is not None) != ("ffn_in" in masked)
        ):
            raise RuntimeError(f"{type(block).__name__} was patched: it does not apply {ffn_activation}")
