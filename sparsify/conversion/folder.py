"""The sparse checkpoint folder: weights, configuration, the code that gives them their meaning, a tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sparsify import models
from sparsify.conversion.architecture import sparse_config
from sparsify.conversion.source import read_checkpoint
from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.models import MODEL_CLASSES, FfnActivation, SparseConfig, SparseModel
from sparsify.models.modeling_sparse_mistral import SparseMistralMLP
from sparsify.models.modeling_sparse_mixtral import SparseMixtralExperts

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)


def write_config(config: SparseConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes config.json with `auto_map`, and beside it the files that it points to."""
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
    for name in (config_file, model_file, "ffn_activation"):
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
        ffn_activation: Activation to load it with; the folder's own unless given (swiglu for a stock checkpoint).
        dtype: Dtype of the weights; the stored one unless given.
        gate_threshold: Of that activation; the folder's own unless given.

    Raises:
        ModelError: If the folder is no whole checkpoint, cannot be held, or any key is missing or unexpected.
    """
    checkpoint = read_checkpoint(folder)
    kept = checkpoint.config.get("ffn_activation", "swiglu")
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
    for block in model.ffn_blocks():
        own = "forward" not in vars(block) and type(block) in (
            SparseMistralMLP,
            SparseMixtralExperts,
        )
        activation = getattr(block, "ffn_activation", None)
        if (
            not own
            or not isinstance(activation, FfnActivation)
            or activation.name != ffn_activation
            or activation.gate_threshold != model.config.ffn_gate_threshold
            or (activation.threshold is None) != (model.config.ffn_thresholds == "none")
        ):
            raise RuntimeError(
                f"{type(block).__name__} was patched: it does not apply {ffn_activation}"
            )


def load_tokenizer(folder: Path, where: str = "") -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint folder.

    Args:
        folder: Where its files are.
        where: What to call that in messages; `folder` unless given.

    Raises:
        ModelError: If the folder has none that can be read.
    """
    try:
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise OSError(f"it has none of {', '.join(VOCABULARIES)}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(
            f"{where or folder} has no tokenizer that can be read: {reason}",
            allowed="tokenizer.json with tokenizer_config.json, or tokenizer.model with tokenizer_config.json.",
            next_step="Copy the tokenizer files of the base model there, or set model.tokenizer.",
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ModelError(
            f"{where or folder} has a {type(tokenizer).__name__}, which is not backed by the tokenizers library.",
            next_step="Convert it to tokenizer.json, or name another one by model.tokenizer.",
        )
    return tokenizer


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: SparseConfig, where: str) -> None:
    """Refuses a tokenizer that can produce ids beyond the model's embedding.

    Raises:
        ModelError: With both sizes.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise ModelError(
            f"The tokenizer does not match the model: {where} has token ids up to {largest}, the model embeds "
            f"{config.vocab_size} tokens.",
            next_step="Use the tokenizer that the checkpoint was trained with (model.tokenizer).",
        )


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a tokenizer's files as they are, tokenizer.model among them."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
