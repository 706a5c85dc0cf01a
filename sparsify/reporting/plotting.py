"""Rendering of matplotlib figures to files and pages, with a light and a dark theme."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """A colour palette. Series differ in lightness as well as in hue, to be distinct for colour-blind readers."""

    name: str
    surface: str
    ink: str
    muted: str
    line: str
    product: str
    product_fill: str
    """A tint of `product` as background for text."""
    gate: str
    up: str
    baseline: str
    heat_stops: tuple[str, ...]
    """Sequential colours from low to high, monotone in lightness."""

    @property
    def heat(self) -> LinearSegmentedColormap:
        return LinearSegmentedColormap.from_list(f"{self.name}_heat", self.heat_stops)

    def rc(self) -> dict[str, Any]:
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
            "text.parse_math": False,  # a name may have dollar signs
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
    baseline="#8b867c",
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
    baseline="#99948b",
    heat_stops=("#22262b", "#204c5c", "#2f7f99", "#4fa9c6", "#d9f1ee"),
)


WIDTH_INCHES = 9.4
PNG_DOTS_PER_INCH = 160
# The page's fonts, so that text in figures matches the page on every machine.
PAGE_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Draw = Callable[[Theme], Figure]


def image(draw: Draw, name: str, theme: Theme, kind: Literal["png", "svg"]) -> bytes:
    """Renders a figure; the same `draw` and `name`, unique on its page, give the same bytes."""
    # Ids inside an SVG are hashes; the salt keeps ids of different figures on one page different.
    settings: dict[Any, Any] = theme.rc() | {"svg.hashsalt": f"{name}-{theme.name}"}
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        draw(theme).savefig(buffer, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata)
    drawn = buffer.getvalue()
    return drawn.replace(b"'DejaVu Sans'", PAGE_FONTS.encode()) if kind == "svg" else drawn


def page_figure(draw: Draw, name: str, title: str, caption: str) -> dict[str, str]:
    """A figure for base.html.j2: title, caption, and data URLs of the light and the dark drawing."""
    drawings = {theme.name: base64.b64encode(image(draw, name, theme, "svg")).decode() for theme in (LIGHT, DARK)}
    links = {theme: f"data:image/svg+xml;base64,{data}" for theme, data in drawings.items()}
    return {"title": title, "caption": caption, **links}
