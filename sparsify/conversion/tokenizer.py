"""A checkpoint folder's tokenizer. Imports no model code, which would cost every process that tokenises some seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

from sparsify.errors import ModelError
from sparsify.files import write_json
from sparsify.metadata import read_json

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
TOKENIZER_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
)

GENERIC_CLASS = "PreTrainedTokenizerFast"
"""Takes tokenizer.json as it is, in every version of transformers."""
JSON_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def load_tokenizer(folder: Path, where: str = "") -> PreTrainedTokenizerFast:
    """Loads the tokenizer of a checkpoint folder. It puts nothing after a text: a tokenizer that appends </s> would end
    every prompt, and the model would begin another document.

    Raises:
        ModelError: If the folder has none that can be read.
    """
    try:
        if not any((folder / name).is_file() for name in VOCABULARIES):
            raise OSError(f"it has none of {', '.join(VOCABULARIES)}")
        _check_files(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if isinstance(tokenizer, PreTrainedTokenizerFast):
            _append_nothing(tokenizer)  # some of its settings are first read with a text
    except ModelError:
        raise
    except BaseException as error:  # whatever a file's content makes transformers, or its Rust code, raise
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        reason = (str(error) or type(error).__name__).partition("\n")[0]
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


def _append_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    ids, plain = (tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
    start = next((start for start in range(len(ids)) if ids[start : start + len(plain)] == plain), 0)
    if len(ids) == start + len(plain):
        return
    before = [(str(tokenizer.convert_ids_to_tokens(number)), number) for number in ids[:start]]
    names = [name for name, _ in before]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=[*names, "$A"], pair=[*names, "$A", *names, "$B"], special_tokens=before
    )


def _check_files(folder: Path) -> None:
    for name in (*JSON_FILES, "config.json"):
        if (folder / name).exists():
            read_json(folder / name, ModelError)


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


def write_tokenizer(source: Path, folder: Path) -> None:
    """Writes a checkpoint's tokenizer so that it gives the same ids whatever the type of the model next to it.

    transformers chooses a tokenizer's class by model_type, and some classes replace what tokenizer.json says. So the files
    are written from the tokenizer as the source loads it, under the class that takes tokenizer.json as it is.

    Raises:
        ModelError: If the source has none that can be read.
    """
    copy_tokenizer(source, folder)  # tokenizer.model, which other engines read
    save_tokenizer(load_tokenizer(source), folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    write_json(path, read_json(path, ModelError) | {"tokenizer_class": GENERIC_CLASS})


def copy_tokenizer(source: Path, folder: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def set_chat_template(folder: Path, template: str) -> None:
    """Makes this the only chat template of a folder's tokenizer."""
    config_file = folder / "tokenizer_config.json"
    if config_file.is_file():
        config = read_json(config_file, ModelError)
        if config.pop("chat_template", None) is not None:
            write_json(config_file, config)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
