"""The checkpoint that a recipe names: where it is, which of its files hold the weights, and whether they are whole."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from sparsify.conversion.architecture import family_held, held_fields, text_part
from sparsify.conversion.source_tensors import EMBEDDING, HEAD, SourceTensor, check_dtypes, read_header, stock_tensors
from sparsify.errors import ModelError
from sparsify.metadata import read_json, user_path
from sparsify.models.masking import projection_shapes

CHECKPOINT_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "*.gguf"]
PACKAGE_PREFIX = "package:"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
NEXT_STEP = "Give a checkpoint folder, a Hub id, a GGUF file or package:NAME/PATH."


def locate(source: str, revision: str | None = None) -> Path:
    """Path of the folder or GGUF file that `source` names, downloaded from the Hub when it is a Hub id.

    Raises:
        ModelError: If there is nothing of that name.
    """
    if source.startswith(PACKAGE_PREFIX):
        return in_package(source)
    path = user_path(source)
    if path.exists():
        return path
    if path.is_symlink():
        raise ModelError(
            f"{source} is a link that leads to no file: {path.readlink()}.",
            next_step="Correct the link, or give the checkpoint itself.",
        )
    if not is_hub_id(source):
        raise ModelError(f"There is no checkpoint at {source}.", next_step=NEXT_STEP)
    try:
        return Path(snapshot_download(source, revision=revision, allow_patterns=CHECKPOINT_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE") == "1"
        raise ModelError(
            f"{source!r} is neither a local folder nor a model on the Hub"
            f"{' (HF_HUB_OFFLINE=1)' if offline else ''}: {str(error).splitlines()[0]}",
            next_step=NEXT_STEP,
        ) from error


def is_hub_id(source: str) -> bool:
    """Whether `source` can only be looked for on the Hub."""
    elsewhere = source.startswith((PACKAGE_PREFIX, ".", "/", "~")) or source.count("/") != 1
    return not elsewhere and not user_path(source).exists()


def in_package(source: str) -> Path:
    """The path of `package:NAME/PATH`. Raises ModelError if there is none; nothing is imported."""
    package, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    # Finds without importing, as long as no parent of a dotted name has to be imported.
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):  # "__main__" has none
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source}: the Python package {package!r} is not installed.",
            next_step="The recipe's first lines say how to install it; the form is package:NAME/PATH.",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise ModelError(f"{source}: package {package!r} has no {inside!r}.", next_step=NEXT_STEP)
    return path


@dataclass(frozen=True)
class SourceCheckpoint:
    """A safetensors checkpoint on this machine whose files are complete.

    Attributes:
        config: Content of config.json; embeddings are tied only if the stored ones are equal.
        shards: The files with its weights, as transformers chooses them.
        tensors: Its tensors by their names in the layout of its family, whatever the layout on disk.
        notes: What of the folder is not taken as it says, in sentences.
    """

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    tensors: dict[str, SourceTensor]
    notes: list[str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


def read_checkpoint(folder: Path) -> SourceCheckpoint:
    """Reads a checkpoint's configuration and the headers of its weights; of tensors only a stored head of tied embeddings.

    Raises:
        ModelError: If the folder is not a checkpoint, or a file of it is missing, truncated or corrupt, or a tensor is
            stored as numbers that are not its values.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a checkpoint (no config.json).",
            allowed="A folder with config.json, safetensors weights and a tokenizer.",
            next_step=NEXT_STEP,
        )
    if (folder / ADAPTER).is_file():
        raise ModelError(
            f"{folder} holds an adapter ({ADAPTER}), which would be ignored.",
            next_step="Merge it into its base model (merge_and_unload() of peft), save that, and give the result; "
            f"or remove {ADAPTER}.",
        )
    config = text_part(read_json(folder / "config.json", ModelError))
    shards, notes = _weight_files(folder, config)
    tensors: dict[str, SourceTensor] = {}
    family = family_held(config)
    rows: dict[str, int] = {}
    if family is not None and family.fused:
        sizes = SimpleNamespace(**held_fields(config, str(folder)))
        rows = {name: shape[0] for name, shape in projection_shapes(sizes).items()}
    for shard in shards:
        tensors |= stock_tensors(read_header(shard), family, rows)
    if not config.get("quantization_config"):  # that is refused with its own reason
        check_dtypes(folder, tensors, has_codes=bool(config.get("quantisation")))
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if config.get("tie_word_embeddings") and head is not None:
        if embedding is None:
            tensors[EMBEDDING] = tensors.pop(HEAD)
        elif not head.equals(embedding):
            config["tie_word_embeddings"] = False
            notes.append(
                f"{folder}: config.json ties the embeddings, but {HEAD} differs from {EMBEDDING}: both are kept, untied"
            )
    return SourceCheckpoint(folder, config, shards, tensors, notes)


def _weight_files(folder: Path, config: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """The files that transformers would load, in its order, and notes on those that it would not."""
    explicit = config.get("transformers_weights")
    if explicit is not None:
        if not isinstance(explicit, str) or Path(explicit).name != explicit:
            raise ModelError(f"{folder / 'config.json'} says transformers_weights={explicit!r}, not a name of a file.")
        chosen = folder / explicit
    else:
        chosen = folder / SINGLE if (folder / SINGLE).is_file() else folder / INDEX
    if not chosen.is_file():
        raise _no_weights(folder, chosen if explicit else None)
    shards = _indexed(chosen) if chosen.name.endswith(".index.json") else [chosen]
    others = {path.name for path in folder.glob("*.safetensors") if path.is_file()} - {shard.name for shard in shards}
    notes = []
    if others:
        some = ", ".join(sorted(others)[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        notes.append(f"{folder}: the weights are those of {chosen.name}, as transformers chooses; ignored: {some}")
    return shards, notes


def _indexed(index: Path) -> list[Path]:
    shards = [index.parent / name for name in _shard_names(index)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise ModelError(
            f"{index.parent} is incomplete: {', '.join(missing) or 'every file of the index'} is missing.",
            next_step="Download or copy the missing files.",
        )
    return shards


def _no_weights(folder: Path, explicit: Path | None) -> ModelError:
    if explicit is not None:
        return ModelError(f"{folder} is incomplete: {explicit.name} is missing.", next_step="Download or copy it.")
    found = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth"))
    weights = [name for name in found if name.endswith(".safetensors")]
    if weights:
        sharded = any("-of-" in name for name in weights)
        return ModelError(
            f"{folder} has neither {SINGLE} nor {INDEX}, only {', '.join(weights[:3])}.",
            allowed="The files that transformers loads: other names may be adapters or another engine's format.",
            next_step=f"Download or copy {INDEX} too." if sharded else "Save it with model.save_pretrained(...).",
        )
    return ModelError(
        f"{folder} has no safetensors weights{f', only {found[0]}' if found else ''}.",
        allowed="Safetensors only: a pickle from elsewhere can run code.",
        next_step="Save it again with model.save_pretrained(...), which writes safetensors."
        if found
        else f"Give a folder that holds {SINGLE} or its shards.",
    )


def _shard_names(index_path: Path) -> list[str]:
    weight_map = read_json(index_path, ModelError).get("weight_map")
    names = list(weight_map.values()) if isinstance(weight_map, dict) else [weight_map]
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ModelError(
            f"{index_path} names {str(outside[0])[:80]!r} as a file with weights.",
            allowed="weight_map: an object with the name of a file in the same folder for each tensor.",
            next_step="Download or copy this file again.",
        )
    return sorted(set(map(str, names)))
