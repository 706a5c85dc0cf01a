"""The pictures of a comparison in the order of the page: what each is, when it applies, how to draw it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from matplotlib.figure import Figure

from sparsify.comparison.curves import draw_loss, draw_zeros, has_loss
from sparsify.comparison.schema import Comparison
from sparsify.comparison.series import (
    by_value,
    draw_setting,
    has_series,
    plain_means,
    repeats,
    series_of,
)
from sparsify.sparsity.themes import Theme


@dataclass(frozen=True)
class ComparisonFigure:
    """One picture.

    Attributes:
        name: File name without its ending.
        title: Heading on the page, from the comparison.
        caption: What to see in it.
        applies: Whether the comparison has what it shows.
        draw: The drawing function.
    """

    name: str
    title: str
    caption: Callable[[Comparison], str]
    applies: Callable[[Comparison], bool]
    draw: Callable[[Comparison, Theme], Figure]


def figures_of(comparison: Comparison) -> list[ComparisonFigure]:
    """The pictures that this comparison has."""
    return [figure for figure in FIGURES if figure.applies(comparison)]


def _setting_caption(comparison: Comparison) -> str:
    key = comparison.swept_setting or ""
    runs = series_of(comparison)
    means = by_value(plain_means(runs, key))
    caption = f"Losses of the finished runs against {key}, all on the same scale; lower is better. "
    if len(means) > 1:
        value, lowest = min(means, key=itemgetter(1))
        caption += f"The plain mean is lowest, {lowest:.3f}, at {value:g}. "
    if any(run.control is not None for run in runs):
        caption += "Dashed: the dense control of each run. "
    if repeats(runs, key):
        return caption + "The lines go through the mean over training.seed; a point is a run."
    return (
        caption + "One run a point: what another training.seed would change is not known from it."
    )


def _loss_caption(comparison: Comparison) -> str:
    what = (
        "Mean of the sources' losses by token share."
        if comparison.losses_comparable
        else "One panel a source, since the runs' own means cannot be compared; a run is missing where it was not measured on "
        "the windows of the others."
    )
    dashed = any(
        run.control is not None or run.ffn_activation == "swiglu" for run in comparison.runs
    )
    return what + (" Dashed: dense." if dashed else " No dense control is among them.")


FIGURES = (
    ComparisonFigure(
        "setting",
        "What the setting does",
        _setting_caption,
        has_series,
        draw_setting,
    ),
    ComparisonFigure("loss", "Validation loss", _loss_caption, has_loss, draw_loss),
    ComparisonFigure(
        "zeros",
        "Exact zeros",
        lambda comparison: (
            "Share of exact zeros among the products of gate and up, over all layers. Dense runs are left out."
        ),
        lambda comparison: any(
            point.zeros
            for run in comparison.runs
            if run.ffn_activation != "swiglu"
            for point in run.points
        ),
        draw_zeros,
    ),
)
