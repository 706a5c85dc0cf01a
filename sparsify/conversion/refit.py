"""The ridge refit of a down projection: closed form, from a Gram matrix.

With activations h [rows, neurons] and wanted answers y [rows, hidden], the new down projection W [hidden, neurons] is the
least of |h Wᵀ - y|² + λ |W - W₀|², W₀ being the old one: (hᵀh + λ) Wᵀ = hᵀy + λ W₀ᵀ.
"""

from __future__ import annotations

import torch


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

    def __init__(self) -> None:
        self.wanted, self._errors, self.num_rows = 0.0, {}, 0

    def add(self, y: torch.Tensor, **answers: torch.Tensor) -> None:
        """Adds rows: what was wanted and what each candidate answers, [rows, hidden]."""
        self.num_rows += len(y)
        self.wanted += float(y.double().square().sum())
        for name, answer in answers.items():
            error = float((answer - y).double().square().sum())
            self._errors[name] = self._errors.get(name, 0.0) + error

    def relative(self, name: str) -> float | None:
        """|answer - wanted| / |wanted| over all rows; None without rows."""
        if not self.wanted or name not in self._errors:
            return None
        return (self._errors[name] / self.wanted) ** 0.5
