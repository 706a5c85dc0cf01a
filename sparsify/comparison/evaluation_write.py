"""Writes a comparison of evaluations: comparison.json, comparison.csv, the picture and one page."""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

from sparsify.catalogue import MAX_NAME_CHARACTERS
from sparsify.comparison.evaluation_cells import evaluation_tables, evaluation_title
from sparsify.comparison.evaluation_figure import NAME, TITLE, draw_quality, quality_caption
from sparsify.comparison.evaluations import EvaluationComparison
from sparsify.comparison.page import PACKAGE
from sparsify.comparison.schema import COMPARISON_FILE
from sparsify.comparison.write import PAGE_FILE, TABLE_FILE, check_folder
from sparsify.files import atomic_folder
from sparsify.sparsity.page import page_environment
from sparsify.sparsity.pictures import image, page_figure
from sparsify.sparsity.themes import LIGHT


def evaluations_folder(comparison: EvaluationComparison) -> Path:
    """comparisons/SUITE,MODEL vs MODEL."""
    models = " vs ".join(model.name for model in comparison.models)
    name = re.sub("[^-+.,=0-9A-Za-z_]+", "-", f"{comparison.suite},{models}").strip("-.")
    return Path("comparisons") / name[:MAX_NAME_CHARACTERS]


def write_evaluations(comparison: EvaluationComparison, to: Path) -> None:
    """Writes the comparison into a folder, in place of a comparison that is there already.

    Raises:
        StorageError: If the folder cannot be written, or holds something that is not a comparison.
    """
    check_folder(to)
    draw = partial(draw_quality, comparison)
    figure = page_figure(draw, NAME, TITLE, quality_caption(comparison))
    page = (
        page_environment(PACKAGE)
        .get_template("evaluations.html.j2")
        .render(
            comparison=comparison,
            title=evaluation_title(comparison),
            tables=evaluation_tables(comparison),
            figures=[figure],
        )
    )
    with atomic_folder(to) as fresh:
        json = comparison.model_dump_json(indent=2) + "\n"
        (fresh / COMPARISON_FILE).write_text(json, encoding="utf-8")
        (fresh / f"{NAME}.png").write_bytes(image(draw, NAME, LIGHT, "png"))
        (fresh / PAGE_FILE).write_text(page, encoding="utf-8")
        _write_table(comparison, fresh / TABLE_FILE)


def _write_table(comparison: EvaluationComparison, path: Path) -> None:
    header = ["model", "task", "metric", "score", "low", "high", "items", "zeros", "active_parameters"]  # fmt: skip
    header += ["against", "difference", "difference_low", "difference_high", "verdict"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        for model in comparison.models:
            for name, task in model.tasks.items():
                score, one = task.score, model.differences.get(name)
                paired = (
                    [one.difference.value, one.difference.low, one.difference.high, one.verdict]
                    if one
                    else [None] * 4
                )
                own = [score.value, score.low, score.high, score.items, task.product_zeros]
                active = task.active_parameters.perfect_predictor
                table.writerow(
                    [model.name, name, task.metric, *own, active, model.against, *paired]
                )
