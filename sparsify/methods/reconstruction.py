"""The ridge refit of a down projection: closed form, from a Gram matrix.

With activations h [rows, neurons] and wanted answers y [rows, hidden], the new down projection W [hidden, neurons] is the
least of |h Wᵀ - y|² + λ |W - W₀|², W₀ being the old one: (hᵀh + λ) Wᵀ = hᵀy + λ W₀ᵀ.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Reduce = Callable[[torch.Tensor], object]
"""Sums a tensor in place over those that each hold a part of the rows."""


def nothing_to_reduce(sums: torch.Tensor) -> None:
    """For one who holds all of the rows."""


class Gram:
    """Sums hᵀh and hᵀy over rows, in float64: [neurons, neurons] and [neurons, hidden]."""

    def __init__(self, num_neurons: int, hidden_size: int, device: torch.device) -> None:
        self.num_rows = 0
        self.hh = torch.zeros(num_neurons, num_neurons, dtype=torch.float64, device=device)
        self.hy = torch.zeros(num_neurons, hidden_size, dtype=torch.float64, device=device)

    def add(self, h: torch.Tensor, y: torch.Tensor) -> None:
        """Adds rows: h [rows, neurons], y [rows, hidden]."""
        self.num_rows += len(h)
        self.hh += h.T @ h
        self.hy += h.T @ y

    def reduce(self, reduce: Reduce) -> None:
        rows = torch.tensor([self.num_rows], device=self.hh.device)
        for sums in (rows, self.hh, self.hy):
            reduce(sums)
        self.num_rows = int(rows)

    def solve(self, down: torch.Tensor, ridge: float) -> torch.Tensor:
        """The refitted down projection.

        Args:
            down: The old one, [hidden, neurons].
            ridge: λ as a share of the mean of the Gram matrix's diagonal.

        Returns:
            [hidden, neurons] in the dtype of `down`; `down` itself where no neuron ever fired.
        """
        penalty = ridge * float(self.hh.diagonal().mean())
        if not penalty > 0:
            return down
        self.hh.diagonal().add_(penalty)
        right = self.hy + penalty * down.T.double()
        factor = torch.linalg.cholesky(self.hh)
        self.hh.diagonal().sub_(penalty)
        return torch.cholesky_solve(right, factor).T.to(down.dtype).contiguous()


class Errors:
    """Squared errors of several down projections on the same rows, relative to the size of what was wanted."""

    def __init__(self, names: tuple[str, ...], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(1 + len(names), dtype=torch.float64, device=device)

    def add(self, y: torch.Tensor, **answers: torch.Tensor) -> None:
        """Adds rows: what was wanted and what each candidate answers, [rows, hidden]."""
        self._sums[0] += y.double().square().sum()
        for place, name in enumerate(self._names, start=1):
            self._sums[place] += (answers[name] - y).double().square().sum()

    def reduce(self, reduce: Reduce) -> None:
        reduce(self._sums)

    def relative(self, name: str) -> float | None:
        """|answer - wanted| / |wanted| over all rows; None without rows."""
        wanted, error = float(self._sums[0]), float(self._sums[1 + self._names.index(name)])
        return (error / wanted) ** 0.5 if wanted else None
