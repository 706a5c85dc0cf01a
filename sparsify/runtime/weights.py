"""The weights of one feed-forward block in the kernels' layout: neuron n is row n of every matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import add
from typing import Any, Literal, Protocol

import torch

from sparsify.models.quantised import BlockFormat, BlockMatrix, quantise
from sparsify.runtime.packed import PackedMatrix

Matrix = torch.Tensor | BlockMatrix | PackedMatrix
PREDICTOR_BLOCKS: BlockFormat = "int8"
"""Format of predictors next to int8 and to int4 weights: rounding a score near the threshold switches neurons on or off."""


@dataclass(frozen=True)
class Predictor:
    """Predicts which neurons of a block will fire: relu(x @ a.T) @ b.T > threshold.

    Args:
        a: [rank, hidden].
        b: [neurons, rank]. Both are in int8 blocks where the block's weights are in blocks, of either format.
        threshold: A neuron is on where its score is larger, or NaN.
    """

    a: torch.Tensor | BlockMatrix
    b: torch.Tensor | BlockMatrix
    threshold: float = 0.5

    def like(self, x: torch.Tensor, *, in_blocks: bool) -> Predictor:
        """The predictor for a block that reads x: itself, if it has x's dtype and device, or is in blocks as it must be."""
        parts: list[torch.Tensor | BlockMatrix] = []
        for part in (self.a, self.b):
            if not isinstance(part, BlockMatrix):
                part = quantise(part, PREDICTOR_BLOCKS) if in_blocks else part.to(x)
            parts.append(part)
        a, b = parts
        return self if a is self.a and b is self.b else replace(self, a=a, b=b)


@dataclass(frozen=True)
class Router:
    """Chooses groups of neighbouring neurons of a block: those with x @ weight.T + bias above 0, or the largest of these.

    Args:
        weight: [groups, hidden].
        bias: [groups]; of a router with a threshold the logit of that is taken off.
        kept: How many groups are kept; None for those with scores above 0. NaN is kept.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    kept: int | None = None

    @property
    def nbytes(self) -> int:
        return self.weight.numel() * self.weight.element_size()


@dataclass(frozen=True)
class Copies:
    """Int4 copies of gate and up that rank neurons: only those are computed whose product, as the copies say, is large enough.

    Args:
        gate: In int4 blocks, [neurons, hidden].
        up: The same.
        threshold: A neuron is computed where the magnitude of its product is larger, or NaN.
    """

    gate: BlockMatrix
    up: BlockMatrix
    threshold: float

    @property
    def nbytes(self) -> int:
        return self.gate.nbytes + self.up.nbytes


@dataclass(frozen=True)
class LayerPredictors:
    """Predictors of all layers of a model.

    Args:
        input: `normed` for the input of the block, `residual` for the input of the RMS norm before it.
        layers: For each layer, the predictor of its block, or those of its experts in order.
    """

    input: Literal["normed", "residual"]
    layers: list[list[Predictor]]


class Store(Protocol):
    """Where the rows of a block are that memory does not hold."""

    def attach(self, call: Any) -> None:
        """Tells the kernels' arguments, an `FfnCall`."""
        ...

    def steer(self, call: Any) -> None:
        """Changes the masks of an `FfnCall` that depend on what is in memory."""
        ...


@dataclass(frozen=True)
class FfnWeights:
    """Weights of one block, or of one expert. For all experts of a layer, experts are the first dimension
    of every tensor.

    Args:
        gate: [neurons, hidden], as stored or in blocks, all three alike. [hidden, neurons] if held by columns.
        up: The same.
        down_t: [neurons, hidden]: down_proj.weight transposed, so that a neuron is one row of it.
        thresholds: A product is kept where its magnitude is larger; [neurons], or [1] for all neurons.
        predictor: Neurons that it does not predict are not read.
        gate_thresholds: A neuron is skipped unless the magnitude of its gate factor is larger; of the same shapes.
        gate_constant: Added to the outputs of gate, [neurons].
        up_constant: The same for up.
        down_constant: Added to the output of the block, [hidden].
        copies: What ranks neurons instead of a predictor; of one block or expert only.
        router: What chooses groups of neurons instead of a predictor; of one block or expert only.
        by_columns: Which of `gate` and `up` are held by columns: of these, columns of inputs that are zero are not read.
        masks: `SiteMask`s of the sites `gate`, `up` and `inter` that the thresholds above do not hold.
        store: Where the rows are, if not all of them are in memory: then the matrices are its slots.
        other_bytes: What a step reads in addition to the projections in any case: low-rank factors.
    """

    gate: Matrix
    up: Matrix
    down_t: Matrix
    thresholds: torch.Tensor | None = None
    predictor: Predictor | None = None
    gate_thresholds: torch.Tensor | None = None
    gate_constant: torch.Tensor | None = None
    up_constant: torch.Tensor | None = None
    down_constant: torch.Tensor | None = None
    by_columns: frozenset[str] = frozenset()
    masks: Mapping[str, Any] = field(default_factory=dict)
    other_bytes: int = 0
    copies: Copies | None = None
    router: Router | None = None
    store: Store | None = None

    @property
    def reads_before_masks(self) -> bool:
        """Whether something chooses neurons by the block's input before its mask."""
        return self.predictor is not None or self.router is not None

    @property
    def up_first(self) -> bool:
        """Whether rows of gate are read where the up factor is not zero, not rows of up where the gate factor is not."""
        return "up" in self.masks and "gate" not in self.masks

    def constants(self) -> dict[str, torch.Tensor | None]:
        """The three constants by the names of their fields."""
        return {name: getattr(self, name) for name in ("gate_constant", "up_constant", "down_constant")}

    @property
    def neurons(self) -> int:
        return self.down_t.shape[-2]

    @property
    def hidden(self) -> int:
        return self.down_t.shape[-1]

    def thresholds_for(self, device: torch.device) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`thresholds` and `gate_thresholds` as the kernels read them: contiguous fp32, one per neuron."""
        shape = self.down_t.shape[:-1]

        def read(values: torch.Tensor | None) -> torch.Tensor | None:
            if values is None:
                return None
            return values.to(device, torch.float32).expand(shape).contiguous()

        return read(self.thresholds), read(self.gate_thresholds)

    @property
    def predicts_in_blocks(self) -> bool:
        """Whether a predictor is in blocks: next to int8 and int4 weights."""
        return not isinstance(self.gate, torch.Tensor) and self.gate.format != "packed_bf16"

    @property
    def in_blocks(self) -> bool:
        """Whether they are in blocks, or packed."""
        return not isinstance(self.gate, torch.Tensor)

    @property
    def rounds_states(self) -> bool:
        """Whether products with rows round what they read, as blocks do."""
        return not isinstance(self.gate, torch.Tensor) and self.gate.format != "packed_bf16"

    @property
    def row_bytes(self) -> int:
        return line_bytes(self.down_t)

    @property
    def read_bytes(self) -> LineBytes:
        """Bytes of what is counted when it is read."""
        held = [getattr(self, name) for name in sorted(self.by_columns)]
        column = line_bytes(held[0]) if held else 0
        rows, columns = (3 - len(held)) * self.row_bytes, len(held) * column * self.hidden
        copies = 0 if self.copies is None else self.copies.nbytes
        router = 0 if self.router is None else self.router.nbytes
        matrices = (self.gate, self.up, self.down_t)
        factors = sum(one.factor_bytes for one in matrices if not isinstance(one, torch.Tensor))
        others = (self.predictor_bytes + copies + router + factors + self.other_bytes) / self.neurons
        return LineBytes(self.row_bytes, column, others, rows + columns / self.neurons)

    @property
    def predictor_bytes(self) -> int:
        if self.predictor is None:
            return 0
        return sum(part.shape[-2] * line_bytes(part) for part in (self.predictor.a, self.predictor.b))

    def check(self, x: torch.Tensor) -> None:
        """Checks shapes, dtypes and devices: the kernels read memory by these shapes.

        Raises:
            ValueError: If one of them does not fit, with its name and both values.
        """
        *experts, neurons, hidden = self.gate.shape
        if "gate" in self.by_columns:
            neurons, hidden = hidden, neurons
        expected = {
            "up": (*experts, hidden, neurons) if "up" in self.by_columns else (*experts, neurons, hidden),
            "down_t": (*experts, neurons, hidden),
            "x": (*x.shape[:-1], hidden),
        }
        parts = {"gate": self.gate, "up": self.up, "down_t": self.down_t, "x": x}
        if self.predictor is not None:
            rank = self.predictor.a.shape[-2]
            parts |= {"predictor.a": self.predictor.a, "predictor.b": self.predictor.b}
            expected |= {
                "predictor.a": (*experts, rank, hidden),
                "predictor.b": (*experts, neurons, rank),
            }
        if self.copies is not None:
            for name, copy in (("copies.gate", self.copies.gate), ("copies.up", self.copies.up)):
                if (
                    copy.shape != (neurons, hidden)
                    or copy.format != "int4"
                    or copy.device != x.device
                    or self.predictor
                ):
                    raise ValueError(
                        f"{name} is {_kind(copy)} {list(copy.shape)} on {copy.device}; it must be int4 blocks "
                        f"{[neurons, hidden]} on {x.device}, without a predictor."
                    )
        if self.router is not None and (
            neurons % len(self.router.weight)
            or self.router.weight.shape[1:] != (hidden,)
            or self.router.bias.shape != self.router.weight.shape[:1]
            or self.router.weight.device != x.device
            or self.predictor is not None
            or self.copies is not None
        ):
            raise ValueError(
                f"router is {list(self.router.weight.shape)} on {self.router.weight.device}; it must be [groups, {hidden}] of "
                f"{neurons} neurons in equal groups on {x.device}, without a predictor or copies."
            )
        for name, part in parts.items():
            if tuple(part.shape) != expected.get(name, tuple(part.shape)):
                raise ValueError(f"{name} is {list(part.shape)}; it must be {list(expected[name])}.")
            if part.device != x.device or not self._fits(name, part, x.dtype):
                raise ValueError(
                    f"{name} is {_kind(part)} on {part.device}, x is {x.dtype} on {x.device}; they must be alike."
                )
        for name, values in self.constants().items():
            shape = (*experts, hidden if name == "down_constant" else neurons)
            if values is not None and (tuple(values.shape) != shape or values.device != x.device):
                raise ValueError(
                    f"{name} is {list(values.shape)} on {values.device}; it must be {list(shape)} on {x.device}."
                )
        for name in ("thresholds", "gate_thresholds"):
            values = getattr(self, name)
            if values is not None and values.shape not in ((*experts, neurons), (1,)):
                raise ValueError(
                    f"{name} is {list(values.shape)}; it must be {[*experts, neurons]}, or [1] for one of all."
                )

    def _fits(self, name: str, part: Matrix, dtype: torch.dtype) -> bool:
        """Whether a part has x's dtype or, where the matrices are in blocks or packed, their format, or that of a predictor next to them."""
        if name.startswith("predictor") and self.predicts_in_blocks:
            return isinstance(part, BlockMatrix) and part.format == PREDICTOR_BLOCKS
        if name == "x" or name.startswith("predictor") or isinstance(self.gate, torch.Tensor):
            return isinstance(part, torch.Tensor) and part.dtype == dtype
        return not isinstance(part, torch.Tensor) and _kind(part) == _kind(self.gate)


def line_bytes(matrix: Matrix) -> int:
    """Bytes of a row in memory; of packed rows, in the mean."""
    if isinstance(matrix, PackedMatrix):
        return matrix.row_bytes
    lines = matrix.data if isinstance(matrix, BlockMatrix) else matrix
    return lines.shape[-1] * lines.element_size()


@dataclass(frozen=True)
class LineBytes:
    """Bytes of a block's rows and columns.

    Args:
        row: Of a row of any projection.
        column: Of a column of those that are held by columns.
        others: Of the predictor, of copies that rank neurons, of a router and of low-rank factors, for each neuron.
        dense: Of all three projections, for each neuron.
    """

    row: int
    column: int
    others: float
    dense: float

    def weights(self, rows: RowsRead) -> int:
        """Bytes of the projections that were read."""
        return rows.total * self.row + rows.columns * self.column


def _kind(part: Matrix) -> str:
    if isinstance(part, PackedMatrix):
        return part.format
    return f"{part.format} blocks" if isinstance(part, BlockMatrix) else str(part.dtype)


@dataclass(frozen=True)
class AttentionReads:
    """What native steps read of one layer's query, key, value and output projections.

    Args:
        steps: Number of steps.
        bytes_read: Bytes of weights read, those of rotations and low-rank factors included.
        bytes_offered: Bytes that dense steps read.
    """

    steps: int = 0
    bytes_read: int = 0
    bytes_offered: int = 0


@dataclass
class Options:
    """How a block decodes.

    Args:
        max_tokens: Largest number of tokens of a call for which the kernels are used; None for the dtype's default.
        predictors: One for the block, or one for each of its experts; None for exact decoding.
        blocks: Format of the weights; None as stored.
        dense: Read every row.
        by_columns: Projections that are held by columns, of `held_by_columns`.
        packed: Whether zeros among the weights are skipped.
    """

    max_tokens: int | None
    threads: int | None
    predictors: Sequence[Predictor] | None
    blocks: BlockFormat | None = None
    dense: bool = False
    by_columns: frozenset[str] = frozenset()
    packed: bool = False


class RowsRead:
    """Number of rows read of each projection.

    Counts of kernels on a GPU stay there until one of them is read, so that decoding never synchronises for them.

    Args:
        offered: Neurons of the blocks and experts that tokens were routed to: rows of each projection that could be read. Counted,
            like rows read, once for every eight tokens.
        gate_columns: Columns read of the gate projection, if it is held by columns; then no rows of it are counted.
        up_columns: The same for the up projection.
        counts: Further counts on a device: offered, gate, up, down, gate columns, up columns, int64 [6].
    """

    def __init__(
        self,
        gate: int = 0,
        up: int = 0,
        down: int = 0,
        offered: int = 0,
        gate_columns: int = 0,
        up_columns: int = 0,
        counts: torch.Tensor | None = None,
    ) -> None:
        self._known, self._counts = (offered, gate, up, down, gate_columns, up_columns), counts

    def __iadd__(self, other: RowsRead) -> RowsRead:
        self._known = _sums(self._known, other._known)
        if self._counts is None or other._counts is None:
            self._counts = other._counts if self._counts is None else self._counts
        else:
            self._counts = self._counts + other._counts.to(self._counts.device)
        return self

    def _fetched(self) -> tuple[int, ...]:
        if self._counts is not None:
            self._known = _sums(self._known, self._counts.tolist())
            self._counts = None
        return self._known

    @property
    def offered(self) -> int:
        return self._fetched()[0]

    @property
    def gate(self) -> int:
        return self._fetched()[1]

    @property
    def up(self) -> int:
        return self._fetched()[2]

    @property
    def down(self) -> int:
        return self._fetched()[3]

    @property
    def gate_columns(self) -> int:
        return self._fetched()[4]

    @property
    def up_columns(self) -> int:
        return self._fetched()[5]

    @property
    def total(self) -> int:
        """Rows of all projections; columns are not among them."""
        return self.gate + self.up + self.down

    @property
    def columns(self) -> int:
        return self.gate_columns + self.up_columns


def _sums(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(add, one, other))
