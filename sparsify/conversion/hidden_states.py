"""The residual stream of the calibration windows between two layers, on the disk.

Only one layer's streams are kept: those of a layer take the place of those before it when the layer is done, so that a
calibration that was killed goes on at the layer where it stood.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

CHUNK_TOKENS = 8192
"""Tokens that are computed together."""


class Streams:
    """The residual streams before one layer, by name, [windows, tokens, hidden] in fp32 each.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def create(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """A new stream, to be filled."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.npy"
        stream = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)
        with path.open("r+b") as file:
            # Now, when a full disk is an error; in the middle of the mapping it would be a crash.
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return stream

    def open(self, name: str) -> NDArray[np.float32]:
        """A stream that is there, for reading."""
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def chunks(num_windows: int, window_tokens: int) -> Iterator[slice]:
    """Slices of windows that are computed together."""
    step = max(1, CHUNK_TOKENS // window_tokens)
    return (slice(start, start + step) for start in range(0, num_windows, step))


def tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """A part of a stream as a tensor of its own."""
    return torch.from_numpy(np.array(array)).to(device)
