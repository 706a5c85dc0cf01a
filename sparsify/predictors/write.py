"""Writes a judgement: judgement.json, judgement.csv, pictures and one page; and shows it in a terminal."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape

from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.predictors.figures import FIGURES
from sparsify.predictors.schema import JUDGEMENT_FILE, Judgement, Point, Way
from sparsify.sparsity.page import page_environment
from sparsify.sparsity.percent import percent
from sparsify.sparsity.pictures import image, page_figure
from sparsify.sparsity.themes import LIGHT
from sparsify.terminal import figures_table

PAGE_FILE = "index.html"
TABLE_FILE = "judgement.csv"
PACKAGE, TEMPLATE_FILE = "sparsify.predictors", "page.html.j2"


def write_judgement(judgement: Judgement, to: Path) -> None:
    """Writes a judgement into a folder, in place of one that is there already.

    Raises:
        StorageError: If the folder cannot be written, or holds something else.
    """
    refuse_foreign_folder(to, JUDGEMENT_FILE, "judgement")
    with atomic_folder(to) as fresh:
        text = judgement.model_dump_json(indent=2) + "\n"
        (fresh / JUDGEMENT_FILE).write_text(text, encoding="utf-8")
        _write_table(judgement, fresh / TABLE_FILE)
        for figure in FIGURES:
            png = image(partial(figure.draw, judgement), figure.name, LIGHT, "png")
            (fresh / f"{figure.name}.png").write_bytes(png)
        (fresh / PAGE_FILE).write_text(render_page(judgement), encoding="utf-8")


def render_page(judgement: Judgement) -> str:
    """The page as text: pictures inside as data, on light and on dark paper."""
    figures = [
        page_figure(partial(one.draw, judgement), one.name, one.title, one.caption)
        for one in FIGURES
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(judgement=judgement, figures=figures)


def _write_table(judgement: Judgement, path: Path) -> None:
    columns = [name for name in Point.model_fields if name != "layers"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(way.model_dump() for way in [*judgement.ways, *judgement.points])


def judgement_summary(judgement: Judgement, folder: Path) -> RenderableType:
    """The curve as a table, the verdict, and where the page lies."""
    columns = ("", "recall", "precision", "on", "loss", "perplexity", "bytes", "blocks", "model")
    table = figures_table(
        f"{judgement.model}: predictors judged on {judgement.num_tokens:,} tokens", *columns
    )
    for way in judgement.ways:
        table.add_row(*_cells(way, None, None))
    table.add_section()
    for point in judgement.points:
        style = "bold" if point.threshold == judgement.chosen else None
        table.add_row(*_cells(point, point.recall, point.precision), style=style)
    notes = (
        "on: neurons whose weights are read · bytes: of the feed-forward weights, predictors included\n"
        "blocks, model: predicted speed-up over dense, if bytes are what costs"
    )
    return Group(
        "",
        table,
        f"[dim]{notes}[/dim]",
        f"[bold]{escape(judgement.verdict)}[/bold]",
        f"[bold]Page[/bold]  {escape(str(folder / PAGE_FILE))}",
    )


def _cells(way: Way, recall: float | None, precision: float | None) -> list[str]:
    return [
        way.name,
        percent(recall),
        percent(precision),
        percent(way.on_share),
        f"{way.loss:.4f}",
        f"{way.perplexity:.3f}",
        percent(way.ffn_bytes),
        f"{way.ffn_speedup:.2f}×",
        f"{way.model_speedup:.2f}×",
    ]
