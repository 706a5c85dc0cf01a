"""Drawing a picture as a file or as part of a page, on light and on dark paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
from matplotlib.figure import Figure

from sparsify.sparsity.themes import DARK, LIGHT, Theme

WIDTH_INCHES = 9.4
PNG_DOTS_PER_INCH = 160
# The page's own type, so that letters in pictures and in text are the same on every machine.
PAGE_FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Draw = Callable[[Theme], Figure]


def image(draw: Draw, name: str, theme: Theme, kind: Literal["png", "svg"]) -> bytes:
    """Draws a picture; the same `draw` and `name` give the same bytes.

    Args:
        draw: Draws it in a theme.
        name: Sets it apart from the other pictures of its page.
        theme: The paper.
        kind: The format.
    """
    # Ids inside an SVG are hashes; with a salt of its own no two pictures on one page share any.
    settings: dict[Any, Any] = theme.rc() | {"svg.hashsalt": f"{name}-{theme.name}"}
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        draw(theme).savefig(buffer, format=kind, dpi=PNG_DOTS_PER_INCH, metadata=metadata)
    drawn = buffer.getvalue()
    return drawn.replace(b"'DejaVu Sans'", PAGE_FONTS.encode()) if kind == "svg" else drawn


def page_figure(draw: Draw, name: str, title: str, caption: str) -> dict[str, str]:
    """What base.html.j2 needs of a picture: its words, and both drawings as data."""
    drawings = {
        theme.name: base64.b64encode(image(draw, name, theme, "svg")).decode()
        for theme in (LIGHT, DARK)
    }
    links = {theme: f"data:image/svg+xml;base64,{data}" for theme, data in drawings.items()}
    return {"title": title, "caption": caption, **links}
