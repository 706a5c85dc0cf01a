"""`sparsify compare`: compares runs by their validation losses, or evaluations item by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

from sparsify.compare.evaluation_report import evaluation_notes, evaluation_tables
from sparsify.compare.evaluations import compare_evaluations, result_folders
from sparsify.compare.runs import compare as compare_runs
from sparsify.compare.tables import tables
from sparsify.compare.write import (
    PAGE_FILE,
    check_folder,
    default_folder,
    evaluations_folder,
    write_comparison,
    write_evaluations,
)
from sparsify.reporting.tables import Table


def compare(paths: Sequence[Path], to: Path | None, command: str) -> tuple[BaseModel, RenderableType]:
    """Compares runs, or evaluations, and writes the comparison.

    Args:
        paths: Run folders, or result folders of `sparsify evaluate`; a run folder among results is replaced by its newest
            evaluation of the suite.
        to: Output folder; None for the default.
        command: The command line.

    Returns:
        The comparison, and its summary for the terminal.

    Raises:
        UserError: If there is nothing to compare, or something cannot be read or written.
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
        f"[bold]Comparison[/bold]  {escape(str(folder / PAGE_FILE))}",
    )
