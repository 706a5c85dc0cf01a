"""A file of a model's feed-forward neurons, laid out for reading single ones from a disk.

It holds, block after block (a layer's, or an expert's), the rows of the projections: neuron n is row n of gate, of up, and of the
transposed down. There are three layouts:

- `apart`: the rows of the projection that is computed in full (gate; up where a mask on it comes first), one after the other, then
  one unit for each neuron: the rows of the other two.
- `whole`: one unit for each neuron with all three rows, for predictors, which choose neurons before any projection;
- `columns`: for masks that choose inputs, one unit for each input: its columns of gate and of up; then one for each neuron: its row
  of the transposed down.

A unit is read by one call, so it begins at a multiple of ALIGNMENT bytes, as reads past the page cache need it. Rows are as decoding
reads them: stored, or in int8 or int4 blocks. At the end are the factors of blocks' outputs of the down projections.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sparsify.errors import StorageError
from sparsify.files import storage_errors
from sparsify.models.masking import has_experts, num_experts, num_neurons
from sparsify.models.quantised import BLOCK, BlockFormat, bits_per_weight, column_factors, padded_factors, quantise
from sparsify.runtime.stored_weights import StoredModel, StoredTensor

Layout = Literal["apart", "whole", "columns"]
ALIGNMENT = 512
"""Of reads past the page cache on most disks; where it is not enough, reads go through the page cache."""
ROW_ALIGNMENT = 64
MAGIC = b"SPARSIFY NEURONS 1\n"
HEADER_BYTES = 4096
CHUNK_ROWS = 512

Tell = Callable[[str], None]


@dataclass(frozen=True)
class NeuronLayout:
    """Where the rows of each neuron are.

    Attributes:
        identity: Of the model's weights.
        first: The projection that is computed in full: `gate` or `up`.
        weights: `stored`, or the format of blocks.
        dtype: Of stored weights.
        row_bytes: Of one row.
        unit_bytes: Of one unit.
    """

    identity: str
    layout: Layout
    first: Literal["gate", "up"]
    weights: str
    dtype: str
    blocks: int
    neurons: int
    hidden: int
    row_bytes: int
    unit_bytes: int

    @property
    def rows_bytes(self) -> int:
        """Of a block's rows that are apart from its units."""
        return _aligned(self.neurons * self.row_bytes, ALIGNMENT) if self.layout == "apart" else 0

    @property
    def block_bytes(self) -> int:
        units = self.neurons * self.unit_bytes if self.layout != "columns" else self.inputs_bytes + self.downs_bytes
        return self.rows_bytes + units

    @property
    def inputs_bytes(self) -> int:
        """Of the units of a block's inputs, in `columns`."""
        return self.hidden * self.unit_bytes

    @property
    def down_bytes(self) -> int:
        """Of the unit of a neuron's row of transposed down, in `columns`."""
        return _aligned(self.row_bytes, ALIGNMENT)

    @property
    def downs_bytes(self) -> int:
        return self.neurons * self.down_bytes

    @property
    def whole_bytes(self) -> int:
        """Memory of one block: contiguous rows for a prompt, and units for a token that needs all."""
        if self.layout == "columns":  # each in memory of its own
            return sum(_aligned(one, mmap.PAGESIZE) for one in (self.inputs_bytes, self.downs_bytes))
        return self.neurons * max(3 * self.row_bytes, self.unit_bytes)

    @property
    def factor_bytes(self) -> int:
        """Of the factors of one block's down projection."""
        return 0 if self.weights == "stored" else 4 * _aligned(self.hidden, BLOCK)

    @property
    def factors_offset(self) -> int:
        return HEADER_BYTES + self.blocks * self.block_bytes

    @property
    def file_bytes(self) -> int:
        return self.factors_offset + self.blocks * self.factor_bytes

    @property
    def in_unit(self) -> tuple[str, ...]:
        """The projections whose rows a unit holds, in order."""
        second = "up" if self.first == "gate" else "gate"
        return (second, "down") if self.layout == "apart" else ("gate", "up", "down")

    @property
    def part_bytes(self) -> int:
        """From one row of a unit to the next."""
        return _aligned(self.row_bytes, ROW_ALIGNMENT)

    def rows_offset(self, block: int) -> int:
        """Of the rows that are apart from the units, in the file."""
        return HEADER_BYTES + block * self.block_bytes

    def units_offset(self, block: int) -> int:
        return self.rows_offset(block) + self.rows_bytes

    def header(self) -> bytes:
        text = json.dumps(asdict(self), sort_keys=True).encode()
        content = MAGIC + hashlib.sha256(text).hexdigest().encode() + b"\n" + text
        assert len(content) <= HEADER_BYTES
        return content.ljust(HEADER_BYTES, b"\0")


def neuron_layout(model: StoredModel, weights: str, layout: Layout, first: Literal["gate", "up"]) -> NeuronLayout:
    """The layout of a model's neurons.

    Args:
        model: The model.
        weights: `stored`, `int8` or `int4`.
        layout: See above.
        first: The projection that is computed in full.
    """
    hidden, blocks = model.config.hidden_size, num_experts(model.config) * model.config.num_hidden_layers
    row = row_bytes(hidden, weights, model.dtype)
    parts = 2 if layout == "apart" else 3
    unit = _aligned(parts * _aligned(row, ROW_ALIGNMENT), ALIGNMENT)
    if layout == "columns":
        unit = _aligned(2 * num_neurons(model.config) * model.dtype.itemsize, ALIGNMENT)
    dtype = str(model.dtype).removeprefix("torch.")
    return NeuronLayout(
        model.identity(), layout, first, weights, dtype, blocks, num_neurons(model.config), hidden, row, unit
    )


def row_bytes(hidden: int, weights: str, dtype: torch.dtype) -> int:
    """Bytes of a neuron's row of one projection."""
    if weights == "stored":
        return hidden * dtype.itemsize
    format: BlockFormat = "int8" if weights == "int8" else "int4"
    return round(-(-hidden // BLOCK) * BLOCK * bits_per_weight(format) / 8)


def neuron_folder() -> Path:
    """Where neuron files are kept: SPARSIFY_NEURON_CACHE, or ~/.cache/sparsify/neurons."""
    return Path(os.environ.get("SPARSIFY_NEURON_CACHE", "~/.cache/sparsify/neurons")).expanduser()


class NeuronFile:
    """A neuron file that is open for reading.

    Attributes:
        layout: Its layout.
        descriptor: Past the page cache if `direct`.
        factors: Of each block's down projection, as a BlockMatrix holds them; empty for stored weights.
    """

    def __init__(self, path: Path, layout: NeuronLayout) -> None:
        self.path, self.layout = path, layout
        with storage_errors(path, "read"):
            self.direct, self.descriptor = _opened(path)
            self._state = self._now()
            shape = layout.blocks, layout.factor_bytes // 4
            found = np.fromfile(path, np.float32, shape[0] * shape[1], offset=layout.factors_offset)
            self.factors = torch.from_numpy(found).view(shape)

    def _now(self) -> tuple[int, int]:
        found = os.fstat(self.descriptor)
        return found.st_size, found.st_mtime_ns

    def check(self) -> None:
        """Raises StorageError if the file was changed since it was opened."""
        if self._now() != self._state:
            raise StorageError(
                f"{self.path} was changed while it was read.",
                next_step="Nothing else was changed. Remove this file and run the same command again: it is written again.",
            )

    def close(self) -> None:
        os.close(self.descriptor)


def _opened(path: Path) -> tuple[bool, int]:
    """Whether reads go past the page cache, and the descriptor."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct)
            room = mmap.mmap(-1, mmap.PAGESIZE)
            try:
                if os.preadv(descriptor, [memoryview(room)[ALIGNMENT : 2 * ALIGNMENT]], ALIGNMENT) == ALIGNMENT:
                    return True, descriptor
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            os.close(descriptor)
    return False, os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def open_neurons(model: StoredModel, layout: NeuronLayout, tell: Tell) -> NeuronFile:
    """Opens the neuron file of a model, writing it first unless it is there. Of several processes one writes, the others wait.

    Args:
        model: The model.
        layout: The layout wanted.
        tell: Gets what takes long, as a line of text.

    Raises:
        StorageError: If it cannot be written, or read.
    """
    folder = neuron_folder()
    key = hashlib.sha256(layout.header()).hexdigest()[:16]
    path = folder / f"{model.folder.resolve().name}-{layout.weights}-{layout.layout}-{key}.neurons"
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    if not _is_whole(path, layout):
        with _alone(path, tell):
            if not _is_whole(path, layout):
                write_neurons(model, layout, path, tell)
    return NeuronFile(path, layout)


@contextmanager
def _alone(path: Path, tell: Tell) -> Iterator[None]:
    """Only one process at a time; the system ends the claim of one that died."""
    lock = path.with_name(f".{path.name}.lock")
    with storage_errors(path), lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"Another process writes {path}; waiting for it.")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _is_whole(path: Path, layout: NeuronLayout) -> bool:
    """Whether a file has the header and the size of a layout: then it is that of these weights."""
    try:
        with path.open("rb") as file:
            return file.read(HEADER_BYTES) == layout.header() and os.fstat(file.fileno()).st_size == layout.file_bytes
    except FileNotFoundError:
        return False


def write_neurons(model: StoredModel, layout: NeuronLayout, path: Path, tell: Tell) -> None:
    """Writes a neuron file, under another name until it is whole. Needs the memory of one projection of a block.

    Raises:
        StorageError: If the disk has no room for it, or refuses.
    """
    free = shutil.disk_usage(path.parent).free
    if free < layout.file_bytes:
        raise StorageError(
            f"The neurons need {layout.file_bytes / 1e9:,.1f} GB, and {path.parent} has {free / 1e9:,.1f} GB left.",
            next_step="Free space, or name another folder in SPARSIFY_NEURON_CACHE.",
        )
    for left in path.parent.glob(f".{path.name}.partial-*"):  # of a process that was killed: this one has the lock
        left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    experts = num_experts(model.config)
    try:
        with storage_errors(path), partial.open("wb", buffering=0) as file:
            file.write(layout.header())
            factors: list[torch.Tensor] = []
            for block in range(layout.blocks):
                if block % experts == 0:
                    tell(
                        f"Writing {path} ({layout.file_bytes / 1e9:,.2f} GB, once): layer {block // experts + 1} of "
                        f"{layout.blocks // experts}"
                    )
                expert = block % experts if has_experts(model.config) else None
                factors.append(_write_block(model.block(block // experts, expert), layout, file))
                _forget(file)
            if layout.factor_bytes:
                _all(file.write, torch.stack(factors).numpy())
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _forget(file: object) -> None:
    """Written pages need not stay in the page cache: they may count as memory of this process's group."""
    descriptor = file.fileno()  # pyright: ignore[reportAttributeAccessIssue]
    if hasattr(os, "posix_fadvise"):
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _write_block(
    stored: tuple[StoredTensor, StoredTensor, StoredTensor], layout: NeuronLayout, file: object
) -> torch.Tensor:
    """Writes a block; returns the factors of its down projection, which are used for blocks alone."""
    if layout.layout == "columns":
        return _write_columns(stored, layout, file)
    matrices: dict[str, StoredTensor] = dict(zip(("gate", "up", "down"), stored, strict=True))
    down = matrices["down"].read()
    factors = column_factors(down.mT) if layout.factor_bytes else torch.ones(0)
    write = file.write  # pyright: ignore[reportAttributeAccessIssue]

    def rows(name: str, begin: int, end: int) -> torch.Tensor:
        """uint8 [rows, row_bytes]."""
        part = down[:, begin:end].mT if name == "down" else matrices[name].rows(begin, end).read()
        if layout.weights == "stored":
            return part.contiguous().view(torch.uint8)
        part = part.float() / factors if name == "down" else part
        return quantise(part, "int8" if layout.weights == "int8" else "int4").data

    chunks = [(begin, min(begin + CHUNK_ROWS, layout.neurons)) for begin in range(0, layout.neurons, CHUNK_ROWS)]
    if layout.layout == "apart":
        for chunk in chunks:
            _all(write, rows(layout.first, *chunk).numpy())
        padding = layout.rows_bytes - layout.neurons * layout.row_bytes
        _all(write, memoryview(bytes(padding)))
    for begin, end in chunks:
        units = torch.zeros(end - begin, layout.unit_bytes, dtype=torch.uint8)
        for place, name in enumerate(layout.in_unit):
            start = place * layout.part_bytes
            units[:, start : start + layout.row_bytes] = rows(name, begin, end)
        _all(write, units.numpy())
    return padded_factors(factors)


def _write_columns(
    stored: tuple[StoredTensor, StoredTensor, StoredTensor], layout: NeuronLayout, file: object
) -> torch.Tensor:
    gate, up, down = (one.read() for one in stored)
    write = file.write  # pyright: ignore[reportAttributeAccessIssue]
    for parts, unit_bytes in (((gate.mT, up.mT), layout.unit_bytes), ((down.mT,), layout.down_bytes)):
        for begin in range(0, len(parts[0]), CHUNK_ROWS):
            values = torch.cat([one[begin : begin + CHUNK_ROWS] for one in parts], 1).contiguous().view(torch.uint8)
            units = torch.zeros(len(values), unit_bytes, dtype=torch.uint8)
            units[:, : values.shape[1]] = values
            _all(write, units.numpy())
    return torch.ones(0)


def _all(write: Callable[[memoryview], int], content: object) -> None:
    view = memoryview(content).cast("B") if content is not None else memoryview(b"")  # pyright: ignore[reportArgumentType]
    while len(view):
        view = view[write(view) :]


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
