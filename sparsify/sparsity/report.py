"""Writes a sparsity report: report.json, per_layer.csv, figures and a self-contained HTML page."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.reporting.html import page_environment
from sparsify.reporting.plotting import LIGHT, image, page_figure
from sparsify.sparsity.active_parameters import published
from sparsify.sparsity.definitions import formula
from sparsify.sparsity.figures import FIGURES
from sparsify.sparsity.measure import measure
from sparsify.sparsity.schema import REPORT_FILE, LayerRow, SparsityReport, read_report
from sparsify.sparsity.statistics import ActivationStatistics

TEMPLATE_FILE = "page.html.j2"
PACKAGE = "sparsify.sparsity"


def render_page(report: SparsityReport, statistics: ActivationStatistics) -> str:
    """The HTML page, with all figures embedded for light and dark mode."""
    return (
        page_environment(PACKAGE)
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


PAGE_FILE = "index.html"
TABLE_FILE = "per_layer.csv"

__all__ = [
    "LayerRow",
    "SparsityReport",
    "measure",
    "read_report",
    "write_report",
]


def write_report(report: SparsityReport, statistics: ActivationStatistics, to: Path) -> None:
    """Writes the report into a folder and replaces a report that is already there.

    The folder is written atomically. It holds report.json, per_layer.csv, index.html (self-contained) and one PNG for every
    figure on the page.

    Args:
        report: The report that `measure` returned, possibly with additions.
        statistics: The counts that `measure` returned with it.
        to: The output folder.

    Raises:
        StorageError: If the folder cannot be written, or holds something that is not a report.
    """
    refuse_foreign_folder(to, REPORT_FILE, "sparsity report")
    with atomic_folder(to) as fresh:
        _write_files(report, statistics, fresh)


def _write_files(report: SparsityReport, statistics: ActivationStatistics, folder: Path) -> None:
    (folder / REPORT_FILE).write_text(report.model_dump_json(indent=2) + "\n")
    _write_table(report, folder / TABLE_FILE)
    for figure in FIGURES:
        if figure.applies(report):
            png = image(partial(figure.draw, report, statistics), figure.name, LIGHT, "png")
            (folder / f"{figure.name}.png").write_bytes(png)
    (folder / PAGE_FILE).write_text(render_page(report, statistics), encoding="utf-8")


def _write_table(report: SparsityReport, path: Path) -> None:
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, list(LayerRow.model_fields))
        table.writeheader()
        table.writerows(row.model_dump() for row in report.layers)
