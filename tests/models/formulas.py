"""Every activation again, written as its paper does and on purpose not as the library does."""

from __future__ import annotations

import torch

T = 0.5
"""Gate threshold of the tests."""
FORMULAS = {
    "swiglu": lambda g, u: g / (1 + torch.exp(-g)) * u,
    "geglu": lambda g, u: g / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3))) * u,
    "reglu": lambda g, u: torch.where(g > 0, g, 0.0) * u,
    "shifted_relu": lambda g, u: torch.where(g - T > 0, g - T, 0.0) * u,
    "relu2": lambda g, u: torch.where(g > 0, g * g, 0.0) * u,
    "fatrelu": lambda g, u: g * (g > T) * u,
    "drelu": lambda g, u: torch.where(g > 0, g, 0.0) * torch.where(u > 0, u, 0.0),
}
