"""Writes a comparison: comparison.json, comparison.csv, pictures and one page."""

from __future__ import annotations

import csv
import re
from functools import partial
from pathlib import Path

from sparsify.catalogue import MAX_NAME_CHARACTERS
from sparsify.comparison.figures import figures_of
from sparsify.comparison.page import render_page
from sparsify.comparison.schema import COMPARISON_FILE, ComparedRun, Comparison
from sparsify.comparison.settings import common_name
from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.sparsity.pictures import image
from sparsify.sparsity.themes import LIGHT

PAGE_FILE = "index.html"
TABLE_FILE = "comparison.csv"


def default_folder(comparison: Comparison) -> Path:
    """comparisons/NAME, where the name says what is compared: a series by its setting, other runs by their names."""
    swept = (comparison.swept_setting or "").rpartition(".")[2]
    common = common_name([Path(run.path) for run in comparison.runs])
    told = (
        [common, swept] if swept and common else [" vs ".join(run.name for run in comparison.runs)]
    )
    name = re.sub("[^-+.,=0-9A-Za-z_]+", "-", ",".join(told)).strip("-.")
    return Path("comparisons") / name[:MAX_NAME_CHARACTERS]


def check_folder(to: Path) -> None:
    """Refuses a folder that holds something else than a comparison.

    Raises:
        StorageError: If it does.
    """
    refuse_foreign_folder(to, COMPARISON_FILE, "comparison")


def write_comparison(comparison: Comparison, to: Path) -> None:
    """Writes the comparison into a folder, in place of a comparison that is there already.

    The folder appears complete or not at all. It holds comparison.json, comparison.csv, index.html (one file that
    needs no other) and one PNG for every picture on the page.

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
        "control": run.control.path if run.control else run.control_state,
        "gap_to_control": run.control.gap if run.control else None,
        "zeros": run.zeros,
        "tokens_per_second": run.tokens_per_second,
    }
    for name, source in run.sources.items():
        row |= {f"{field}:{name}": value for field, value in source.model_dump().items()}
    return row
