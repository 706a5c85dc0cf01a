"""A checkpoint folder's tokenizer. Imports no model code, which would cost every process that tokenises some seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from sparsify.errors import ModelError

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)


def load_tokenizer(folder: Path, where: str = "") -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint folder.

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


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: PreTrainedConfig, where: str) -> None:
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
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
