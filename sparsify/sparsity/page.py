"""Renders a sparsity report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import math
from functools import partial

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

from sparsify.sparsity.active_parameters import published
from sparsify.sparsity.definitions import formula
from sparsify.sparsity.figures import FIGURES
from sparsify.sparsity.percent import count, percent
from sparsify.sparsity.pictures import page_figure
from sparsify.sparsity.schema import SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics

TEMPLATE_FILE = "page.html.j2"
BASE_PACKAGE = "sparsify.sparsity"
"""Holds base.html.j2: the look that all pages share."""


def page_environment(package: str) -> Environment:
    """Finds the templates of a package, and base.html.j2 that they extend."""
    packages = dict.fromkeys((package, BASE_PACKAGE))
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(name, ".") for name in packages]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "count": count}
    return environment


def render_page(report: SparsityReport, statistics: ActivationStatistics) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    return (
        page_environment(BASE_PACKAGE)
        .get_template(TEMPLATE_FILE)
        .render(
            report=report,
            formula=formula(report.ffn_activation, report.ffn_thresholds),
            perplexity=_perplexity(report.loss),
            published=published(),
            figures=[
                page_figure(
                    partial(figure.draw, report, statistics),
                    figure.name,
                    figure.title,
                    figure.caption(report, statistics),
                )
                for figure in FIGURES
                if figure.applies(report)
            ],
        )
    )


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
