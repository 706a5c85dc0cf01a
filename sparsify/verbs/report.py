"""`sparsify report`: measures a model or a run on held-out text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sparsify.export.weights import load
from sparsify.mixture.heldout import check_text_or_mixture, mixture_windows, windows_from
from sparsify.mixture.windows import Window, collate
from sparsify.recipe import Recipe
from sparsify.sparsity.report import SparsityReport, measure, write_report
from sparsify.training.history import stages, trajectory
from sparsify.verbs import Say


def make_report(
    model_or_run: str, on: str | None, num_tokens: int, to: Path | None, say: Say
) -> tuple[SparsityReport, Path]:
    """Measures a model or a run on held-out text and writes its report.

    Args:
        model_or_run: Model folder, Hub id, run folder or checkpoint.
        on: Text file, mixture name or mixture path; a run's own mixture, else the quickstart's, unless given.
        num_tokens: Tokens to measure on.
        to: Folder of the report; RUN/report or reports/NAME unless given.
        say: Told what happens.

    Returns:
        The report and the folder that holds it.
    """
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    windows, text = _report_windows(loaded, on, num_tokens)
    say(f"Measuring {loaded.name} on {sum(len(w.input_ids) for w in windows):,} tokens: {text}")
    report, statistics = measure(
        loaded.model,
        (collate([window]) for window in windows),
        name=loaded.name,
        text=text,
        sources=[window.source for window in windows],
    )
    report.command = " ".join(["sparsify", *sys.argv[1:]])
    if loaded.trained is not None:
        report.stages = stages(loaded.trained.run)
        report.trajectory = trajectory(loaded.trained.run)
    name = re.sub("[^-.0-9A-Za-z_]+", "-", model_or_run).strip("-.")
    default = loaded.trained.run.report if loaded.trained else Path("reports") / name
    folder = to or default
    write_report(report, statistics, folder)
    return report, folder


def _report_windows(loaded: Any, on: str | None, num_tokens: int) -> tuple[list[Window], str]:
    recipe = loaded.trained.run.load_recipe() if loaded.trained else None
    window_tokens = min(512, loaded.model.config.max_position_embeddings)
    if recipe is not None:
        window_tokens = recipe.training.window_tokens
    settings = {
        "num_tokens": num_tokens,
        "window_tokens": window_tokens,
        "cache_dir": Path(recipe.cache_dir if recipe else Recipe().cache_dir).expanduser(),
    }
    if on is None and recipe is not None:
        windows = mixture_windows(recipe.mixture, loaded.tokenizer, **settings)
        return windows, f"held-out windows of mixture {recipe.mixture.name}"
    return windows_from(on or "quickstart", loaded.tokenizer, **settings)
