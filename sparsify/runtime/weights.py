"""The weights of one feed-forward block as the kernels want them: neuron n is row n of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsify.runtime.blocks import BlockMatrix

Matrix = torch.Tensor | BlockMatrix


@dataclass(frozen=True)
class Predictor:
    """Says which neurons of a block will fire: relu(x @ a.T) @ b.T > threshold.

    Args:
        a: [rank, hidden].
        b: [neurons, rank].
        threshold: A neuron is on where its score is larger, or no number.
    """

    a: torch.Tensor
    b: torch.Tensor
    threshold: float = 0.5


@dataclass(frozen=True)
class FfnWeights:
    """Weights of one block, or of one expert.

    Args:
        gate: [neurons, hidden], as stored or in blocks, all three alike.
        up: [neurons, hidden].
        down_t: [neurons, hidden]: down_proj.weight transposed, so that a neuron is one row of it.
        thresholds: A product is kept where its size is larger; float32 [neurons].
        predictor: Reads nothing of a neuron that it does not predict.
    """

    gate: Matrix
    up: Matrix
    down_t: Matrix
    thresholds: torch.Tensor | None = None
    predictor: Predictor | None = None

    @property
    def in_blocks(self) -> bool:
        """Whether the weights are int8 or int4 blocks."""
        return isinstance(self.gate, BlockMatrix)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one projection."""
        row = self.gate.data if isinstance(self.gate, BlockMatrix) else self.gate
        return row.shape[1] * row.element_size()

    @property
    def predictor_bytes(self) -> int:
        """Bytes that a prediction reads."""
        if self.predictor is None:
            return 0
        return sum(
            part.numel() * part.element_size() for part in (self.predictor.a, self.predictor.b)
        )

    def check(self, x: torch.Tensor) -> None:
        """Refuses what does not fit together: the kernels read memory by these shapes.

        Raises:
            ValueError: With the name and both values.
        """
        neurons, hidden = self.gate.shape
        expected = {
            "up": (neurons, hidden),
            "down_t": (neurons, hidden),
            "x": (*x.shape[:-1], hidden),
        }
        parts = {"gate": self.gate, "up": self.up, "down_t": self.down_t, "x": x}
        if self.predictor is not None:
            rank = self.predictor.a.shape[0]
            parts |= {"predictor.a": self.predictor.a, "predictor.b": self.predictor.b}
            expected |= {"predictor.a": (rank, hidden), "predictor.b": (neurons, rank)}
        for name, part in parts.items():
            if tuple(part.shape) != expected.get(name, tuple(part.shape)):
                raise ValueError(
                    f"{name} is {list(part.shape)}; it must be {list(expected[name])}."
                )
            if part.device != x.device or not self._fits(part, x.dtype):
                raise ValueError(
                    f"{name} is {_kind(part)} on {part.device}, x is {x.dtype} on {x.device}; they must be alike."
                )
        if self.thresholds is not None and self.thresholds.shape != (neurons,):
            raise ValueError(
                f"thresholds is {list(self.thresholds.shape)}; it must be [{neurons}]."
            )

    def _fits(self, part: Matrix, dtype: torch.dtype) -> bool:
        """Whether a part is of x's dtype, or, of the three matrices, in blocks like the others."""
        if isinstance(part, BlockMatrix):
            return _kind(part) == _kind(self.gate)
        return part.dtype == dtype and not (
            self.in_blocks and (part is self.up or part is self.down_t)
        )


def _kind(part: Matrix) -> str:
    return f"{part.format} blocks" if isinstance(part, BlockMatrix) else str(part.dtype)


@dataclass
class RowsRead:
    """How many rows were read of each projection."""

    gate: int = 0
    up: int = 0
    down: int = 0

    @property
    def total(self) -> int:
        """Rows of all three."""
        return self.gate + self.up + self.down

    def __iadd__(self, other: RowsRead) -> RowsRead:
        self.gate, self.up, self.down = (
            self.gate + other.gate,
            self.up + other.up,
            self.down + other.down,
        )
        return self
