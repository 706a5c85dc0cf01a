"""Reports a tuning: figures, tune.json, a self-contained HTML page, and tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.files import storage_errors, write_text
from sparsify.reporting.html import page_environment
from sparsify.reporting.plotting import LIGHT, WIDTH_INCHES, Theme, image, page_figure
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked
from sparsify.tuning.record import RECORD_FILE, WEIGHTED, ShareCurve, TuneRecord

MOST_COLUMNS = 6
MOST_ROWS = 8
COLUMNS_OF_ONE_CURVE = 3

Draw = Callable[[TuneRecord, Theme], Figure]


def loss_against_share(record: TuneRecord, theme: Theme) -> Figure:
    names = shown_domains(record)
    curves = record.curves[:MOST_COLUMNS]
    if len(curves) == 1:
        figure, panels = _wrapped(len(names))
    else:
        figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 1.45 * len(names)))
        grid = figure.subplots(len(names), len(curves), sharex="col", sharey="row", squeeze=False)
        panels = list(grid.flat)
    pairs = [(name, curve) for name in names for curve in curves]
    for axes, (name, curve) in zip(panels, pairs, strict=True):
        _panel(axes, record, curve, name, theme)
        axes.set_ylim(_loss_range(curves, name))
        first_column, last_row = curve is curves[0], name == names[-1] or len(curves) == 1
        if first_column:
            axes.set_title(_title(name), fontsize=9)
        if last_row:
            axes.set_xlabel(f"share of {curve.part}")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8.5)
    return figure


def shown_domains(record: TuneRecord) -> list[str]:
    """The weighted loss and the domains with the largest weights, up to MOST_ROWS."""
    by_weight = sorted(record.domains, key=lambda name: -record.domains[name].weight)
    kept = by_weight[: MOST_ROWS - 1]
    return [WEIGHTED, *(name for name in record.domains if name in kept)]


def _wrapped(num_panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(COLUMNS_OF_ONE_CURVE, num_panels)
    rows = -(-num_panels // columns)
    figure = Figure(figsize=(WIDTH_INCHES, 0.5 + 2.3 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[num_panels:]:
        axes.remove()
    return figure, panels[:num_panels]


def _title(name: str) -> str:
    return "weighted loss, nats per token" if name == WEIGHTED else name


def _panel(axes: Axes, record: TuneRecord, curve: ShareCurve, name: str, theme: Theme) -> None:
    part = record.parts.index(curve.part)
    shares, losses = np.array(curve.shares), np.array(curve.losses[name])
    half, at = np.array(curve.half_widths[name]), [one.part_shares[part] for one in record.trials]
    colour = theme.product if name == WEIGHTED else theme.baseline
    fill = theme.product_fill if name == WEIGHTED else theme.line
    axes.fill_between(shares, losses - half, losses + half, color=fill, lw=0, label="90% band")
    axes.plot(shares, losses, color=colour, linewidth=1.8, label="regression")
    observed = curve.trial_losses[name]
    axes.plot(at[1:], observed[1:], "o", color=theme.ink, markersize=3.6, label="trial")
    axes.plot(
        at[:1],
        observed[:1],
        "s",
        color=theme.gate,
        markersize=5.5,
        label="default mixture",
    )
    tuned = record.tuned_part_shares[part]
    label = "tuned mixture" if record.reason is None else "predicted best, not supported"
    axes.axvline(tuned, color=theme.up, linewidth=1.2, linestyle=(0, (4, 2)), label=label)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))


def _loss_range(curves: Sequence[ShareCurve], name: str) -> tuple[float, float]:
    """Range of all lines and trials of a row. Bands are ignored: they may extend far beyond the data."""
    values = [value for one in curves for value in one.losses[name] + one.trial_losses[name]]
    margin = 0.2 * ((max(values) - min(values)) or 1e-3)
    return min(values) - margin, max(values) + margin


def observed_against_predicted(record: TuneRecord, theme: Theme) -> Figure:
    """Every trial's loss against its leave-one-out prediction."""
    names = shown_domains(record)
    figure, panels = _wrapped(len(names))
    for axes, name in zip(panels, names, strict=True):
        if name == WEIGHTED:
            pairs = [(one.loo_weighted_loss, one.weighted_loss) for one in record.trials]
            quality = record.weighted.loo_r2
        else:
            pairs = [(one.loo_losses[name], one.losses[name]) for one in record.trials]
            quality = record.domains[name].loo_r2
        predicted, observed = zip(*pairs, strict=True)
        low, high = min(predicted + observed), max(predicted + observed)
        margin = 0.08 * ((high - low) or 1e-3)
        ends = (low - margin, high + margin)
        axes.plot(ends, ends, color=theme.line, linewidth=1.2, zorder=0)
        axes.plot(predicted[1:], observed[1:], "o", color=theme.ink, markersize=4)
        axes.plot(predicted[:1], observed[:1], "s", color=theme.gate, markersize=6)
        axes.set(xlim=ends, ylim=ends, xlabel="predicted, leave-one-out", ylabel="observed")
        axes.set_title(f"{_title(name).partition(',')[0]}: R² {quality:.2f}", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(axis="x")
    return figure


PAGE_FILE = "index.html"
PACKAGE, TEMPLATE_FILE = "sparsify.tuning", "tune.html.j2"
FIGURES: dict[Draw, str] = {
    loss_against_share: "Loss against share",
    observed_against_predicted: "Can the regression be trusted?",
}


def write_page(record: TuneRecord, folder: Path) -> None:
    write_text(folder / RECORD_FILE, record.model_dump_json(indent=2) + "\n")
    for draw in FIGURES:
        path = folder / f"{draw.__name__}.png"
        with storage_errors(path):
            path.write_bytes(image(partial(draw, record), draw.__name__, LIGHT, "png"))
    write_text(folder / PAGE_FILE, render_page(record))


def render_page(record: TuneRecord) -> str:
    captions: dict[Draw, str] = {
        loss_against_share: _share_caption(record),
        observed_against_predicted: "Each trial's loss against the prediction of the regression fitted to all other "
        "trials. Points on the line are predicted exactly; at an R² of 0 or below, the mean of the other trials "
        "predicts as well.",
    }
    figures = [
        page_figure(partial(draw, record), draw.__name__, title, captions[draw]) for draw, title in FIGURES.items()
    ]
    template = page_environment(PACKAGE).get_template(TEMPLATE_FILE)
    return template.render(record=record, figures=figures)


def _share_caption(record: TuneRecord) -> str:
    moved = (
        "One share varies while the others keep the default's proportions. Each trial is moved to that path by the "
        "regression and drawn with its residual."
        if len(record.parts) > 2
        else "The dots are the measured trials."
    )
    hidden = len(record.domains) + 1 - len(shown_domains(record))
    more = f" {hidden} domains with the smallest weights are in {RECORD_FILE} only." if hidden else ""
    return f"Held-out loss after {record.trial_tokens:,} training tokens. {moved}{more}"


COLUMNS = ("domain", "weight", "token share", "loss", "error", "R²")


def tune_summary(record: TuneRecord, folder: Path, given: str) -> RenderableType:
    table = Table(
        f"{record.recipe}: predicted after {record.trial_tokens:,} tokens, from {len(record.trials)} trials",
        COLUMNS,
    )
    for name, domain in record.domains.items():
        table.add(
            name,
            f"{domain.weight:.1%}",
            f"{domain.default_share:.1%} → {domain.tuned_share:.1%}",
            f"{domain.default_loss:.4f} → {domain.tuned_loss:.4f}",
            f"{domain.loo_error:.4f}",
            f"{domain.loo_r2:.2f}",
        )
    table.add_rule()
    losses = f"{record.default_loss:.4f} → {record.tuned_loss:.4f}"
    zeros = f"{record.default_zeros:.2%} → {record.tuned_zeros:.2%}"
    for name, values, quality, error in (
        ("weighted loss", losses, record.weighted, f"{record.weighted.loo_error:.4f}"),
        ("exact zeros", zeros, record.zeros, f"{record.zeros.loo_error:.2%}"),
    ):
        table.add(name, "", "", values, error, f"{quality.loo_r2:.2f}")
    parts: list[RenderableType] = [
        "",
        table,
        "Default → predicted best. Error and R² are leave-one-out. The weighted loss is minimised: the weight of a "
        "domain is its share in the recipe's mixture, times its --weight.",
    ]
    if record.confirmation is not None:
        parts += ["", _confirmation_table(record)]
    parts += ["", Text(record.verdict, "bold"), *_places(record, folder, given)]
    return Group(*parts)


def _confirmation_table(record: TuneRecord) -> Table:
    found = record.confirmation
    assert found is not None
    table = Table(
        f"Confirmation: {found.num_tokens:,} tokens, seed {found.seed}, other held-out sequences",
        ["domain", "default loss", "tuned loss", "difference"],
    )
    for name, loss in found.default_losses.items():
        tuned = found.tuned_losses[name]
        table.add(name, f"{loss:.4f}", f"{tuned:.4f}", f"{tuned - loss:+.4f}")
    table.add_rule()
    row = (found.default_loss, found.tuned_loss)
    table.add("weighted loss", *(f"{loss:.4f}" for loss in row), f"{found.difference:+.4f}")
    return table


def _places(record: TuneRecord, folder: Path, given: str) -> list[RenderableType]:
    lines: list[RenderableType] = [marked("[bold]Page[/bold]     {}", folder / PAGE_FILE)]
    if record.mixture_file is None:
        lines.append("No mixture was written; --force writes the predicted one anyway.")
        return lines
    lines.append(marked("[bold]Mixture[/bold]  {}", record.mixture_file))
    lines.append(marked("Next: [cyan]sparsify plan {} mixture={}[/cyan]", given, record.mixture_file))
    return lines
