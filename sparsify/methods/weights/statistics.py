"""What a projection reads on calibration tokens, summed: how many rows, the energy of each channel, and their products."""

from __future__ import annotations

import torch


class InputStatistics:
    """Sums over rows x of what a projection reads, in float64.

    Args:
        num_channels: Elements of a row.
        products: Whether the sum of x xᵀ is kept, not only its diagonal: 8 bytes for each pair of channels.

    Attributes:
        peaks: Largest magnitude of each channel, in fp32. [channels]
        factor: What a method makes of the products once it `is_factored`.
    """

    def __init__(self, num_channels: int, device: torch.device, *, products: bool) -> None:
        self.num_rows = 0
        self.energies = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.peaks = torch.zeros(num_channels, device=device)
        self.products: torch.Tensor | None = None
        self.factor: torch.Tensor | None = None
        self.is_factored = False
        if products:
            self.products = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor) -> None:
        """Adds rows, [rows, channels]."""
        self.num_rows += len(x)
        self.energies += x.double().square().sum(0)
        if len(x):
            self.peaks = torch.maximum(self.peaks, x.abs().amax(0))
        if self.products is not None:
            self.products += x.T @ x

    @property
    def norms(self) -> torch.Tensor:
        """Norm of each channel over all rows, in fp32. [channels]"""
        return self.energies.sqrt().float()
