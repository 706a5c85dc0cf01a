"""The shares of a mixture over a run as an area chart."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, PercentFormatter

from sparsify.errors import RecipeError
from sparsify.files import write_bytes
from sparsify.recipe import Recipe, share_phases

COLOURS = matplotlib.colormaps["tab20"](range(20))
STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9.5}


def write_chart(recipe: Recipe, to: Path) -> None:
    """Draws which share each source has at every moment of a run.

    Args:
        recipe: The recipe.
        to: A .png file; one that is there is replaced.

    Raises:
        RecipeError: If `to` is no .png file.
        StorageError: If the disk or the folder refuses.
    """
    if to.suffix != ".png":
        raise RecipeError(f"--chart is {to}.", allowed="The path of a .png file.")
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        _draw(recipe).savefig(buffer, format="png", dpi=160)
    write_bytes(to, buffer.getvalue())


def share_corners(recipe: Recipe) -> tuple[list[float], dict[str, list[float]]]:
    """Training tokens at every corner of the shares, and each source's share there; between corners lines are straight."""
    budget_tokens = recipe.num_steps * recipe.step_tokens
    tokens, start = [], 0.0
    shares: dict[str, list[float]] = {name: [] for name in recipe.mixture.sources}
    for end, first, last in share_phases(recipe.mixture):
        for where, values in ((start, first), (end, last)):
            tokens.append(where * budget_tokens)
            for name, corner in shares.items():
                corner.append(values[name])
        start = end
    return tokens, shares


def _draw(recipe: Recipe) -> Figure:
    tokens, shares = share_corners(recipe)
    figure = Figure(figsize=(9.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    areas = axes.stackplot(
        tokens, np.array([*shares.values()]), colors=COLOURS, edgecolor="white", linewidth=0.6
    )
    axes.set(ylim=(0, 1), xlim=(0, tokens[-1]), xlabel="training tokens", ylabel="share of tokens")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_title(f"{recipe.name}: mixture {recipe.mixture.name}", loc="left", fontsize=10)
    # As they lie on one another, the last on top.
    handles = dict(zip(shares, areas, strict=True))
    names = list(handles)[::-1]
    figure.legend(
        [handles[name] for name in names], names, loc="outside right upper", frameon=False
    )
    return figure
