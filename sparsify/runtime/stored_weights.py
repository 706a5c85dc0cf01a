"""Weights of a sparse model's folder, read tensor by tensor into given memory.

safetensors maps its files, so what was read counts as this process's memory until the system takes it back. Here files are read
with pread, so that loading needs no more than what is kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from sparsify.errors import ModelError
from sparsify.files import storage_errors
from sparsify.models import FAMILIES, Family
from sparsify.models.masking import has_experts, num_experts, num_neurons

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
MOST_HEADER_BYTES = 100_000_000
READ_BYTES = 1 << 24
NEXT_STEP = "Give a folder that `sparsify export` or `sparsify convert` wrote."
_EXPERTS = re.compile(r"(model\.layers\.\d+\.)mlp\.((?:experts|gate)\..*)")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
        offset: Of its first byte in the file.
    """

    file: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def rows(self, begin: int, end: int) -> StoredTensor:
        """Some of its rows."""
        inner = self.shape[1:]
        row = self.dtype.itemsize * torch.Size(inner).numel()
        return StoredTensor(self.file, self.offset + begin * row, self.dtype, (end - begin, *inner))

    def part(self, index: int) -> StoredTensor:
        """One of the tensors that it holds one after the other."""
        one = self.rows(index, index + 1)
        return StoredTensor(one.file, one.offset, one.dtype, one.shape[1:])

    def read_into(self, to: torch.Tensor) -> torch.Tensor:
        """Reads it into contiguous memory of the same dtype and size; returns that.

        Raises:
            ModelError: If the file ends before.
            StorageError: If it cannot be read.
        """
        assert to.is_contiguous()
        assert to.dtype == self.dtype
        assert to.numel() == torch.Size(self.shape).numel()
        content: Any = to.view(torch.uint8).view(-1).numpy()
        view = memoryview(content) if to.numel() else memoryview(b"")
        with storage_errors(self.file, "read"), self.file.open("rb", buffering=0) as file:
            done = 0
            while done < len(view):
                read = os.preadv(file.fileno(), [view[done : done + READ_BYTES]], self.offset + done)
                if read == 0:
                    raise ModelError(
                        f"{self.file} is truncated.", next_step="Copy this file again, or export the model again."
                    )
                done += read
            if hasattr(os, "posix_fadvise"):  # what was read once need not stay in the page cache
                os.posix_fadvise(file.fileno(), self.offset, self.nbytes, os.POSIX_FADV_DONTNEED)
        return to

    def read(self) -> torch.Tensor:
        return self.read_into(torch.empty(self.shape, dtype=self.dtype))

    def element(self, index: int) -> torch.Tensor:
        """One of its elements in the order in which they are stored, [1]."""
        return StoredTensor(self.file, self.offset + index * self.dtype.itemsize, self.dtype, (1,)).read()


class StoredModel:
    """A folder with a sparse model: its configuration, and where its tensors are.

    Raises:
        ModelError: If it holds no whole sparse model in full precision.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config, self.family = _configuration(folder)
        self.files = sorted(folder.glob("*.safetensors"))
        self.tensors: dict[str, StoredTensor] = {}
        for file in self.files:
            self.tensors |= _header(file)
        if not self.tensors:
            raise ModelError(f"{folder} holds no safetensors files.", next_step=NEXT_STEP)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor("model.embed_tokens.weight").dtype

    def name_on_disk(self, name: str) -> str:
        """Of a tensor of the model in memory."""
        match = _EXPERTS.fullmatch(name)
        other = f"{match[1]}{self.family.blocks_on_disk}.{match[2]}" if match else name
        return other if other in self.tensors else name

    def __contains__(self, name: str) -> bool:
        return self.name_on_disk(name) in self.tensors

    def tensor(self, name: str) -> StoredTensor:
        """A tensor by its name in the model's memory."""
        found = self.tensors.get(self.name_on_disk(name))
        if found is None:
            raise ModelError(f"{self.folder} has no tensor {name}.", next_step=NEXT_STEP)
        return found

    def block(self, layer: int, expert: int | None) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """gate and up [neurons, hidden] and down [hidden, neurons] of a feed-forward block, or of one expert."""
        prefix = f"model.layers.{layer}.mlp."
        if expert is None:
            gate, up, down = (self.tensor(f"{prefix}{one}_proj.weight") for one in ("gate", "up", "down"))
        elif f"{prefix}experts.gate_up_proj" in self:
            both = self.tensor(f"{prefix}experts.gate_up_proj").part(expert)
            half = both.shape[0] // 2
            gate, up = both.rows(0, half), both.rows(half, 2 * half)
            down = self.tensor(f"{prefix}experts.down_proj").part(expert)
        else:
            names = self.family.expert_projections
            gate, up, down = (
                self.tensor(f"{prefix}experts.{expert}.{names[f'{one}_proj']}.weight") for one in ("gate", "up", "down")
            )
        neurons, hidden = num_neurons(self.config), self.config.hidden_size
        for one, shape in ((gate, (neurons, hidden)), (up, (neurons, hidden)), (down, (hidden, neurons))):
            if one.shape != shape or one.dtype != self.dtype:
                raise ModelError(
                    f"A projection of layer {layer} of {self.folder} is {one.dtype} {list(one.shape)}.",
                    allowed=f"{self.dtype} {list(shape)}, as config.json says.",
                    next_step=NEXT_STEP,
                )
        return gate, up, down

    def gate_values(self, layer: int, chosen: slice) -> torch.Tensor:
        """Values of a layer's gate projection, or of gate and up of all its experts, as if these were one flat tensor."""
        experts = num_experts(self.config) if has_experts(self.config) else None
        parts = [self.block(layer, None)[:1]] if experts is None else [self.block(layer, e)[:2] for e in range(experts)]
        tensors = [one for part in parts for one in part]
        size = torch.Size(tensors[0].shape).numel()
        places = range(size * len(tensors))[chosen]
        return torch.cat([tensors[place // size].element(place % size) for place in places])

    def identity(self) -> str:
        """Changes with the weights: a hash of the files' headers, sizes and times, and of the configuration."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        for file in self.files:
            found = file.stat()
            digest.update(repr((file.name, found.st_size, found.st_mtime_ns)).encode())
        digest.update(repr(sorted(self.tensors.items())).encode())
        return digest.hexdigest()

    def generation_config(self) -> GenerationConfig:
        if (self.folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(self.folder)
        return GenerationConfig.from_model_config(self.config)


def _configuration(folder: Path) -> tuple[Any, Family]:
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} is not the folder of a model: there is no config.json.", next_step=NEXT_STEP)
    with storage_errors(file, "read"):
        try:
            fields = json.loads(file.read_text())
            kind = fields.get("model_type")
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{file} is damaged: {error}.", next_step=NEXT_STEP) from None
    if kind not in FAMILIES:
        raise ModelError(
            f"{folder} holds a model of type {kind!r}.", allowed=f"{', '.join(FAMILIES)}.", next_step=NEXT_STEP
        )
    try:
        return FAMILIES[kind].config.from_pretrained(folder), FAMILIES[kind]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ModelError(f"{file} is damaged: {str(error).partition(chr(10))[0]}.", next_step=NEXT_STEP) from error


def _header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; its length is checked against its header."""
    with storage_errors(file, "read"), file.open("rb") as opened:
        size = file.stat().st_size
        length = int.from_bytes(opened.read(8), "little")
        try:
            if not 0 < length <= min(size - 8, MOST_HEADER_BYTES):
                raise ValueError("its header does not fit into it")
            entries = json.loads(opened.read(length))
            entries.pop("__metadata__", None)
            found = {}
            for name, entry in entries.items():
                begin, end = entry["data_offsets"]
                if entry["dtype"] not in DTYPES:
                    raise ModelError(
                        f"{name} of {file} is stored as {entry['dtype']}.",
                        allowed=f"Weights in full precision: {', '.join(DTYPES)}.",
                        next_step=NEXT_STEP,
                    )
                one = StoredTensor(file, 8 + length + begin, DTYPES[entry["dtype"]], tuple(entry["shape"]))
                if one.nbytes != end - begin or 8 + length + end > size:
                    raise ValueError(f"{name} does not fit into it")
                found[name] = one
            return found
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{file} is truncated or corrupt: {error}.",
                next_step="Copy this file again; compare its size with the original's.",
            ) from None
