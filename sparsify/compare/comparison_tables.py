"""The tables of a comparison, for both the terminal and the page."""

from __future__ import annotations

from sparsify.compare.caveats import MARK
from sparsify.compare.schema import ComparedRun, Comparison, Setting, SourceOfRun
from sparsify.recipe.identity import short_settings
from sparsify.reporting.numbers import percent
from sparsify.reporting.tables import Table

MAX_SETTING_COLUMNS = 4
"""More settings than this get a separate table, with one row per setting."""


def title(comparison: Comparison) -> str:
    """Title of a comparison: setting and values of a sweep, otherwise the names of the runs."""
    key = comparison.swept_setting
    if key is None:
        return " · ".join(_names(comparison))
    values = dict.fromkeys(setting_text(run.settings[key]) for run in comparison.runs)
    return f"{short_settings([key])[key]}: {', '.join(values)}"


def tables(comparison: Comparison) -> list[Table]:
    return [
        *_settings_table(comparison),
        _runs_table(comparison),
        *([_sources_table(comparison)] if comparison.sources else []),
    ]


def setting_text(value: Setting) -> str:
    """A setting's value as in YAML, with digits grouped."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _settings_table(comparison: Comparison) -> list[Table]:
    if len(comparison.settings) <= MAX_SETTING_COLUMNS:
        return []
    rows = [[key, *(setting_text(run.settings[key]) for run in comparison.runs)] for key in comparison.settings]
    return [Table("Settings that differ", ["setting", *_names(comparison)], rows)]


def _runs_table(comparison: Comparison) -> Table:
    keys = comparison.settings if len(comparison.settings) <= MAX_SETTING_COLUMNS else []
    with_mean = shows_mean(comparison)
    with_weights = any(run.weight_sparsity for run in comparison.runs)
    header = [
        "run",
        *(short_settings(keys)[key] for key in keys),
        "training tokens",
        "training loss",
        "validation loss",
        "to dense baseline",
        *(["unweighted mean"] if with_mean else []),
        "exact zeros",
        *(["zero weights"] if with_weights else []),
        "tokens/s",
    ]
    rows = [
        [
            run.name,
            *(setting_text(run.settings[key]) for key in keys),
            _tokens(run),
            _loss(run.train_loss),
            _marked(run.loss, comparable=run.loss_comparable),
            _gap(run),
            *([_loss(run.mean_loss)] if with_mean else []),
            percent(run.zeros) + (MARK if run.zeros and not run.zeros_comparable else ""),
            *([percent(run.weight_sparsity or 0.0)] if with_weights else []),
            "–" if run.tokens_per_second is None else f"{run.tokens_per_second:,.0f}",
        ]
        for run in comparison.runs
    ]
    return Table("Runs", header, rows)


def shows_mean(comparison: Comparison) -> bool:
    """Whether to show the unweighted mean: the validation losses are not comparable, but it is."""
    known = sum(run.mean_loss is not None for run in comparison.runs)
    return known > 1 and len(comparison.sources) > 1 and not comparison.losses_comparable


def _sources_table(comparison: Comparison) -> Table:
    rows = [[run.name, *(_source(run.sources[source]) for source in comparison.sources)] for run in comparison.runs]
    return Table(
        "Validation loss of each source (and its planned token share)",
        ["run", *comparison.sources],
        rows,
    )


def _names(comparison: Comparison) -> list[str]:
    return [run.name for run in comparison.runs]


def _tokens(run: ComparedRun) -> str:
    if run.finished:
        return f"{run.budget_tokens:,}"
    return f"{run.seen_tokens / run.budget_tokens:.0%} of {run.budget_tokens:,}"


def _gap(run: ComparedRun) -> str:
    return run.baseline_state if run.baseline is None else f"{run.baseline.gap:+.3f}"


def _source(source: SourceOfRun) -> str:
    return f"{_marked(source.loss, comparable=source.comparable)} ({percent(source.token_share)})"


def _marked(loss: float | None, *, comparable: bool) -> str:
    return _loss(loss) + (MARK if loss is not None and not comparable else "")


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"
