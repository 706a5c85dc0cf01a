"""Renders a comparison as one HTML page that needs no other file and no network."""

from __future__ import annotations

from functools import partial

from sparsify.comparison.cells import tables, title
from sparsify.comparison.figures import figures_of
from sparsify.comparison.schema import Comparison
from sparsify.sparsity.page import page_environment
from sparsify.sparsity.pictures import page_figure

PACKAGE = "sparsify.comparison"
TEMPLATE_FILE = "comparison.html.j2"


def render_page(comparison: Comparison) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    figures = [
        page_figure(
            partial(figure.draw, comparison), figure.name, figure.title, figure.caption(comparison)
        )
        for figure in figures_of(comparison)
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(
        comparison=comparison, title=title(comparison), tables=tables(comparison), figures=figures
    )
