"""The weights of one feed-forward block as the kernels want them: neuron n is row n of everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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
        gate: [neurons, hidden].
        up: [neurons, hidden].
        down_t: [neurons, hidden]: down_proj.weight transposed, so that a neuron is one row of it.
        thresholds: A product is kept where its size is larger; float32 [neurons].
        predictor: Reads nothing of a neuron that it does not predict.
    """

    gate: torch.Tensor
    up: torch.Tensor
    down_t: torch.Tensor
    thresholds: torch.Tensor | None = None
    predictor: Predictor | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of one projection."""
        return self.gate.shape[1] * self.gate.element_size()

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
            if part.dtype != x.dtype or part.device != x.device:
                raise ValueError(
                    f"{name} is {part.dtype} on {part.device}, x is {x.dtype} on {x.device}; they must be alike."
                )
        if self.thresholds is not None and self.thresholds.shape != (neurons,):
            raise ValueError(
                f"thresholds is {list(self.thresholds.shape)}; it must be [{neurons}]."
            )


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
