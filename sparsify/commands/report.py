"""`sparsify report`: measures a model or a run on held-out text."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from sparsify.commands import Say
from sparsify.errors import RunError
from sparsify.methods.blending import annealed_share
from sparsify.mixture.sequences.held_out import check_text_or_mixture, mixture_windows, windows_from
from sparsify.mixture.sequences.reader import Window, collate
from sparsify.recipe.recipe import Recipe
from sparsify.runs.history import stages, trajectory
from sparsify.runs.load import Loaded, load
from sparsify.sparsity.curves import measure_curves
from sparsify.sparsity.measure import as_against, summed_loss
from sparsify.sparsity.report import SparsityReport, measure, write_report
from sparsify.sparsity.scaling import fit_trajectory
from sparsify.sparsity.statistics import ActivationStatistics
from sparsify.training.checkpoints import read_state


def make_report(
    model_or_run: str,
    on: str | None,
    num_tokens: int,
    to: Path | None,
    say: Say,
    *,
    curve_tokens: int = 0,
    against: str | None = None,
) -> tuple[SparsityReport, Path]:
    """Measures a model or a run on held-out text and writes its report.

    Args:
        model_or_run: Model folder, Hub id, run folder or checkpoint.
        on: Text file, mixture name or mixture path; a run's own mixture, else the quickstart's, unless given.
        num_tokens: Tokens to measure on.
        to: Folder of the report; RUN/report or reports/NAME unless given.
        say: Told what happens.
        curve_tokens: Of the tokens, how many to measure curves on; 0 for no curves.
        against: Another model, run or checkpoint, to measure on the same windows.

    Returns:
        The report and the folder that holds it.

    Raises:
        RunError: If a number of tokens is out of range, or the other model has another tokenizer.
    """
    _check_tokens(num_tokens, curve_tokens)
    if on is not None:
        check_text_or_mixture(on)
    loaded = load(model_or_run)
    other = load(against) if against is not None else None
    if other is not None and other.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
        raise RunError(
            f"{against} has another tokenizer than {model_or_run}: their losses are not per the same tokens.",
            next_step="Compare models of one tokenizer, or make two reports.",
        )
    windows, text = held_out_windows(loaded, on, num_tokens)
    text += anneal_note(loaded)
    say(f"Measuring {loaded.name} on {sum(len(w.input_ids) for w in windows):,} tokens: {text}")
    report, statistics = _measure(loaded, windows, text, curve_tokens, say)
    if other is not None:
        say(f"Measuring {other.name} on the same tokens")
        theirs, _ = _measure(other, windows, text, curve_tokens, say)
        report.against = as_against(theirs)
    report.command = " ".join(["sparsify", *sys.argv[1:]])
    if loaded.trained is not None:
        report.stages = stages(loaded.trained.run)
        report.trajectory = trajectory(loaded.trained.run)
        report.scaling = fit_trajectory(report.trajectory, report.ffn_activation)
    name = re.sub("[^-.0-9A-Za-z_]+", "-", model_or_run).strip("-.")
    default = loaded.trained.run.report if loaded.trained else Path("reports") / name
    folder = to or default
    write_report(report, statistics, folder)
    return report, folder


def _measure(
    loaded: Loaded, windows: list[Window], text: str, curve_tokens: int, say: Say
) -> tuple[SparsityReport, ActivationStatistics]:
    report, statistics = measure(
        loaded.model,
        (collate([window]) for window in windows),
        name=loaded.name,
        text=text,
        sources=[window.source for window in windows],
    )
    if curve_tokens:
        chosen = spread(windows, curve_tokens)
        curve_windows = sum(len(window.input_ids) for window in chosen)
        say(
            f"Curves on {curve_windows:,} of them, about 35 passes; --curve-tokens 0 leaves them out"
        )
        batches = (collate([window]) for window in chosen)
        report.curves = measure_curves(loaded.model, batches, summed_loss)
    return report, statistics


def anneal_note(loaded: Loaded) -> str:
    """What to say of a checkpoint whose activation was still fading in when it was saved."""
    if loaded.trained is None:
        return ""
    recipe = loaded.trained.run.load_recipe()
    state = read_state(loaded.trained.checkpoint)
    share = annealed_share(recipe, state.seen_tokens, state.refits)
    if share == 1:
        return ""
    activation = recipe.activation.ffn_activation
    return f" (saved {share:.0%} of the way to {activation}, measured with {activation} itself)"


def _check_tokens(num_tokens: int, curve_tokens: int) -> None:
    if num_tokens < 1 or curve_tokens < 0:
        raise RunError(
            f"A report on {num_tokens} tokens with curves on {curve_tokens} of them cannot be made.",
            allowed="--tokens 1 or more, --curve-tokens 0 or more.",
        )


def spread(windows: list[Window], num_tokens: int) -> list[Window]:
    """Windows of about that many tokens, evenly from all of them, so that every part of the text is in it."""
    total = sum(len(window.input_ids) for window in windows)
    wanted = min(len(windows), max(1, round(len(windows) * num_tokens / max(total, 1))))
    chosen = [windows[index * len(windows) // wanted] for index in range(wanted)]
    return chosen if any((window.labels >= 0).any() for window in chosen) else windows


def held_out_windows(
    loaded: Loaded, on: str | None, num_tokens: int, window_tokens: int | None = None
) -> tuple[list[Window], str]:
    """Windows to measure a model or a run on, and a phrase that says what they are.

    Args:
        loaded: The model, and its run if it has one.
        on: Text file, mixture name or mixture path; a run's own mixture, else the quickstart's, unless given.
        num_tokens: Tokens wanted; fewer come if there are fewer.
        window_tokens: Length of a window; the run's, or 512, unless given.
    """
    recipe = loaded.trained.run.load_recipe() if loaded.trained else None
    if window_tokens is None:
        window_tokens = min(512, loaded.model.config.max_position_embeddings)
        if recipe is not None:
            window_tokens = recipe.training.window_tokens
    settings: dict[str, Any] = {
        "num_tokens": num_tokens,
        "window_tokens": window_tokens,
        "cache_dir": Path(recipe.cache_dir if recipe else Recipe().cache_dir).expanduser(),
    }
    if on is None and recipe is not None:
        windows = mixture_windows(recipe.mixture, loaded.tokenizer, **settings)
        return windows, f"held-out windows of mixture {recipe.mixture.name}"
    return windows_from(on or "quickstart", loaded.tokenizer, **settings)
