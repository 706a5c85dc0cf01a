"""Colours and type of the pictures, on light and on dark paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from matplotlib.colors import LinearSegmentedColormap


@dataclass(frozen=True)
class Theme:
    """One palette. Series differ in lightness as well as in hue, so that every colour blindness keeps them apart."""

    name: str
    surface: str
    ink: str
    muted: str
    line: str
    product: str
    product_fill: str
    """A tint of `product` on which ink can be read."""
    gate: str
    up: str
    control: str
    heat_stops: tuple[str, ...]
    """Sequential colours from few to many, monotone in lightness."""

    @property
    def heat(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list(f"{self.name}_heat", self.heat_stops)

    def rc(self) -> dict[str, Any]:
        """matplotlib settings."""
        return {
            "figure.facecolor": self.surface,
            "figure.constrained_layout.use": True,
            "figure.constrained_layout.h_pad": 0.08,
            "figure.constrained_layout.hspace": 0.06,
            "savefig.facecolor": self.surface,
            "axes.facecolor": self.surface,
            "axes.edgecolor": self.line,
            "axes.labelcolor": self.muted,
            "axes.titlecolor": self.ink,
            "axes.titlesize": 10,
            "axes.titlelocation": "left",
            "axes.titlepad": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.axisbelow": True,
            "axes.grid": True,
            "axes.grid.axis": "y",
            "grid.color": self.line,
            "grid.linewidth": 0.7,
            "text.color": self.ink,
            "xtick.color": self.line,
            "ytick.color": self.line,
            "xtick.labelcolor": self.muted,
            "ytick.labelcolor": self.muted,
            "ytick.major.size": 0,
            "legend.frameon": False,
            "legend.labelcolor": self.ink,
            "font.family": "sans-serif",
            "font.sans-serif": ["DejaVu Sans"],
            "font.size": 9,
            "svg.fonttype": "none",
        }


LIGHT = Theme(
    name="light",
    surface="#ffffff",
    ink="#1d1c1a",
    muted="#67635b",
    line="#e3dfd6",
    product="#1b6b84",
    product_fill="#c3dde2",
    gate="#d48806",
    up="#b03a75",
    control="#8b867c",
    heat_stops=("#f3efe4", "#a9cfcb", "#4495a6", "#1b6b84", "#0e3344"),
)
DARK = Theme(
    name="dark",
    surface="#1a1c1f",
    ink="#ebe8e1",
    muted="#a5a198",
    line="#35393e",
    product="#4fa9c6",
    product_fill="#24505f",
    gate="#f2b84f",
    up="#ec8fbe",
    control="#99948b",
    heat_stops=("#22262b", "#204c5c", "#2f7f99", "#4fa9c6", "#d9f1ee"),
)
