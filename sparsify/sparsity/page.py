"""Renders a sparsity report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import math
from importlib import resources

from jinja2 import Environment, StrictUndefined

from sparsify.sparsity.definitions import FORMULAS
from sparsify.sparsity.figures import FIGURES, ReportFigure, draw
from sparsify.sparsity.percent import percent
from sparsify.sparsity.schema import SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.sparsity.themes import DARK, LIGHT, Theme

TEMPLATE_FILE = "page.html.j2"


def render_page(report: SparsityReport, statistics: ActivationStatistics) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    template = (resources.files("sparsify.sparsity") / TEMPLATE_FILE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = percent
    return environment.from_string(template).render(
        report=report,
        formula=FORMULAS[report.ffn_activation],
        perplexity=_perplexity(report.loss),
        figures=[
            {
                "title": figure.title,
                "caption": figure.caption(report, statistics),
                "light": _data_uri(figure, report, statistics, LIGHT),
                "dark": _data_uri(figure, report, statistics, DARK),
            }
            for figure in FIGURES
            if figure.applies(report)
        ],
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _data_uri(
    figure: ReportFigure, report: SparsityReport, statistics: ActivationStatistics, theme: Theme
) -> str:
    svg = draw(figure, report, statistics, theme, "svg")
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"
