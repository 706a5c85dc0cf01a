"""The state of a training of predictors: one safetensors file, whose header holds the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sparsify.errors import RunError
from sparsify.files import write_bytes


def write_state(
    path: Path, key: dict[str, Any], tensors: dict[str, torch.Tensor], numbers: dict[str, Any]
) -> None:
    """Writes a state under a temporary name, then renames it.

    Args:
        path: The file.
        key: What the state belongs to.
        tensors: By name.
        numbers: Anything that JSON holds.
    """
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"key": json.dumps(key), "numbers": json.dumps(numbers)}
    write_bytes(path, save(kept, metadata=metadata))


def read_state(
    path: Path, key: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """The state that a training of the same key left behind, or None.

    Raises:
        RunError: If it belongs to another training, or is damaged.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"The state of an interrupted training, {path}, is damaged: {error}",
            next_step="Remove it to begin again.",
        ) from error
    there, wanted = json.loads(metadata["key"]), json.loads(json.dumps(key))
    if there != wanted:
        other = [name for name in wanted if there.get(name) != wanted[name]]
        raise RunError(
            f"{path} is the state of a training with another {', '.join(other)}.",
            allowed="The same settings, model and text, to go on with it.",
            next_step="Remove it to begin again, or choose another folder with --to.",
        )
    return tensors, json.loads(metadata["numbers"])
