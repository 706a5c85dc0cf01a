"""`sparsify compare`: writes a comparison of runs or of evaluations: comparison.json, comparison.csv, figures, and a self-contained page."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.compare.comparison_tables import tables, title
from sparsify.compare.evaluation_report import (
    NAME,
    TITLE,
    draw_quality,
    evaluation_notes,
    evaluation_tables,
    evaluation_title,
    quality_caption,
)
from sparsify.compare.evaluations import EvaluationComparison, compare_evaluations, result_folders
from sparsify.compare.figures import figures_of
from sparsify.compare.runs import compare as compare_runs
from sparsify.compare.schema import COMPARISON_FILE, ComparedRun, Comparison
from sparsify.compare.settings import common_name
from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.recipe.identity import MAX_NAME_CHARACTERS
from sparsify.reporting.html import page_environment
from sparsify.reporting.plotting import LIGHT, image, page_figure
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked

PACKAGE = "sparsify.compare"
TEMPLATE_FILE = "comparison.html.j2"


def render_page(comparison: Comparison) -> str:
    figures = [
        page_figure(partial(figure.draw, comparison), figure.name, figure.title, figure.caption(comparison))
        for figure in figures_of(comparison)
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(comparison=comparison, title=title(comparison), tables=tables(comparison), figures=figures)


PAGE_FILE = "index.html"
TABLE_FILE = "comparison.csv"


def default_folder(comparison: Comparison) -> Path:
    """comparisons/NAME, where the name is the setting of a sweep, otherwise the names of the runs."""
    swept = (comparison.swept_setting or "").rpartition(".")[2]
    common = common_name([Path(run.path) for run in comparison.runs])
    parts = [common, swept] if swept and common else [" vs ".join(run.name for run in comparison.runs)]
    name = re.sub("[^-+.,=0-9A-Za-z_]+", "-", ",".join(parts)).strip("-.")
    return Path("comparisons") / name[:MAX_NAME_CHARACTERS]


def check_folder(to: Path) -> None:
    """Raises StorageError unless a folder is empty or holds a comparison."""
    refuse_foreign_folder(to, COMPARISON_FILE, "comparison")


def write_comparison(comparison: Comparison, to: Path) -> None:
    """Writes the comparison into a folder and replaces a comparison that is already there.

    The folder is written atomically. It holds comparison.json, comparison.csv, index.html (self-contained) and one PNG for
    every figure on the page.

    Raises:
        StorageError: If the folder cannot be written, or holds something that is not a comparison.
    """
    check_folder(to)
    with atomic_folder(to) as fresh:
        json = comparison.model_dump_json(indent=2) + "\n"
        (fresh / COMPARISON_FILE).write_text(json, encoding="utf-8")
        _write_table(comparison, fresh / TABLE_FILE)
        for figure in figures_of(comparison):
            png = image(partial(figure.draw, comparison), figure.name, LIGHT, "png")
            (fresh / f"{figure.name}.png").write_bytes(png)
        (fresh / PAGE_FILE).write_text(render_page(comparison), encoding="utf-8")


def _write_table(comparison: Comparison, path: Path) -> None:
    rows = [_row(run) for run in comparison.runs]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def _row(run: ComparedRun) -> dict[str, object]:
    row: dict[str, object] = {
        "run": run.name,
        "path": run.path,
        **run.settings,
        "budget_tokens": run.budget_tokens,
        "seen_tokens": run.seen_tokens,
        "measured_tokens": run.measured_tokens,
        "loss": run.loss,
        "loss_comparable": run.loss_comparable,
        "mean_loss": run.mean_loss,
        "train_loss": run.train_loss,
        "baseline": run.baseline.path if run.baseline else run.baseline_state,
        "gap_to_baseline": run.baseline.gap if run.baseline else None,
        "zeros": run.zeros,
        "tokens_per_second": run.tokens_per_second,
    }
    for name, source in run.sources.items():
        row |= {f"{field}:{name}": value for field, value in source.model_dump().items()}
    return row


def evaluations_folder(comparison: EvaluationComparison) -> Path:
    models = " vs ".join(model.name for model in comparison.models)
    name = re.sub("[^-+.,=0-9A-Za-z_]+", "-", f"{comparison.suite},{models}").strip("-.")
    return Path("comparisons") / name[:MAX_NAME_CHARACTERS]


def write_evaluations(comparison: EvaluationComparison, to: Path) -> None:
    """Writes the comparison into a folder, in place of one that is already there."""
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
        _write_evaluation_table(comparison, fresh / TABLE_FILE)


def _write_evaluation_table(comparison: EvaluationComparison, path: Path) -> None:
    header = ["model", "task", "metric", "score", "low", "high", "items", "zeros", "active_parameters"]  # fmt: skip
    header += ["against", "difference", "difference_low", "difference_high", "verdict"]
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(header)
        for model in comparison.models:
            for name, task in model.tasks.items():
                score, one = task.score, model.differences.get(name)
                paired = (
                    [one.difference.value, one.difference.low, one.difference.high, one.verdict] if one else [None] * 4
                )
                own = [score.value, score.low, score.high, score.items, task.product_zeros]
                active = task.active_parameters.perfect_predictor
                table.writerow([model.name, name, task.metric, *own, active, model.against, *paired])


def compare(paths: Sequence[Path], to: Path | None, command: str) -> tuple[BaseModel, RenderableType]:
    """Compares runs, or evaluations, and writes the comparison; a run among results is replaced by its newest
    evaluation of the suite. Raises UserError if there is nothing to compare, or something cannot be read or written.
    """
    if to is not None:
        check_folder(to)
    folders = result_folders(paths)
    if folders is None:
        runs = compare_runs(paths)
        runs.command = command
        folder = to or default_folder(runs)
        write_comparison(runs, folder)
        return runs, _summary(tables(runs), runs.notes, folder)
    evaluations = compare_evaluations(folders)
    evaluations.notes, evaluations.command = evaluation_notes(evaluations), command
    folder = to or evaluations_folder(evaluations)
    write_evaluations(evaluations, folder)
    return evaluations, _summary(evaluation_tables(evaluations), evaluations.notes, folder)


def _summary(tables: list[Table], notes: list[str], folder: Path) -> RenderableType:
    return Group(
        "",
        *tables,
        *(Text(note) for note in notes),
        *([""] if notes else []),
        marked("[bold]Comparison[/bold]  {}", folder / PAGE_FILE),
    )
