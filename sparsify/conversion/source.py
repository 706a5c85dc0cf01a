"""Finding the checkpoint that a recipe names, and knowing that it is whole before anything is read from it."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from sparsify.errors import ModelError

CHECKPOINT_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.txt", "*.gguf"]
PACKAGE_PREFIX = "package:"
NEXT_STEP = "Give a checkpoint folder, a Hub id, a GGUF file or package:NAME/PATH."


@dataclass(frozen=True)
class SourceCheckpoint:
    """A safetensors checkpoint on this machine whose files are complete.

    Attributes:
        folder: Where it is.
        config: Content of its config.json.
        shards: Its safetensors files, sorted by name.
        shapes: Shape of every tensor by name.
    """

    folder: Path
    config: dict[str, Any]
    shards: list[Path]
    shapes: dict[str, tuple[int, ...]]


def locate(source: str, revision: str | None = None) -> Path:
    """Path of the folder or GGUF file that `source` names, downloaded from the Hub when it is a Hub id.

    Raises:
        ModelError: If there is nothing of that name.
    """
    if source.startswith(PACKAGE_PREFIX):
        return _locate_in_package(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
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


def _locate_in_package(source: str) -> Path:
    package, _, inside = source.removeprefix(PACKAGE_PREFIX).partition("/")
    # Finds without importing, as long as no parent of a dotted name has to be imported.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{source}: the Python package {package!r} is not installed.",
            next_step="The recipe's first lines say how to install it; the form is package:NAME/PATH.",
        )
    path = Path(next(iter(spec.submodule_search_locations))) / inside
    if not path.exists():
        raise ModelError(f"{source}: package {package!r} has no {inside!r}.", next_step=NEXT_STEP)
    return path


def read_checkpoint(folder: Path) -> SourceCheckpoint:
    """Reads a checkpoint's configuration and the headers of its weights; no tensor is loaded.

    Raises:
        ModelError: If the folder is not a checkpoint, or a file of it is missing, truncated or corrupt.
    """
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} is not a checkpoint (no config.json).",
            allowed="A folder with config.json, safetensors weights and a tokenizer.",
            next_step=NEXT_STEP,
        )
    config = _read_json(folder / "config.json")
    shards = _shard_paths(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        shapes |= read_shapes(shard)
    return SourceCheckpoint(folder, config, shards, shapes)


def read_shapes(shard: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors; the file's length is checked against its header.

    Raises:
        ModelError: If the file is truncated or corrupt.
    """
    try:
        with safe_open(shard, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{shard} is truncated or corrupt: {error}",
            next_step="Download or copy this file again; compare its size with the original's.",
        ) from error


def _shard_paths(folder: Path) -> list[Path]:
    index_path = folder / "model.safetensors.index.json"
    if index_path.is_file():
        weight_map = _read_json(index_path).get("weight_map", {})
        shards = [folder / name for name in sorted(set(weight_map.values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing or not shards:
            raise ModelError(
                f"{folder} is incomplete: {', '.join(missing) or 'every file of the index'} is missing.",
                next_step="Download or copy the missing files.",
            )
        return shards
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return shards
    pickled = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    raise ModelError(
        f"{folder} has no safetensors weights{f', only {pickled[0].name}' if pickled else ''}.",
        allowed="Safetensors only: a pickle from elsewhere can run code.",
        next_step="Save it again with model.save_pretrained(...), which writes safetensors."
        if pickled
        else "Give a folder that holds model.safetensors or its shards.",
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            f"{path} cannot be read as JSON: {error}", next_step="Download or copy this file again."
        ) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object.")
    return value


def check_tensors(checkpoint: SourceCheckpoint, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuses a checkpoint with a missing tensor, one too many, or one of another shape.

    Raises:
        ModelError: Naming the first few of each kind.
    """
    missing = sorted(expected.keys() - checkpoint.shapes.keys())
    unexpected = sorted(checkpoint.shapes.keys() - expected.keys())
    other = sorted(
        f"{key} {list(checkpoint.shapes[key])} instead of {list(expected[key])}"
        for key in expected.keys() & checkpoint.shapes.keys()
        if checkpoint.shapes[key] != expected[key]
    )
    problems = Counter({"missing": len(missing), "unexpected": len(unexpected), "of another shape": len(other)})
    if not any(problems.values()):
        return
    counts = ", ".join(f"{count} {kind}" for kind, count in problems.items() if count)
    examples = "; ".join((missing[:3] + unexpected[:3] + other[:3])[:5])
    raise ModelError(
        f"The tensors of {checkpoint.folder} do not fit its config.json: {counts} ({examples}).",
        allowed="Every tensor of the architecture, and none besides.",
        next_step="Check that config.json belongs to these weights.",
    )
