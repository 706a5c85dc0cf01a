"""Writes a sparsity report: report.json, per_layer.csv, figures and a self-contained HTML page."""

from __future__ import annotations

import csv
import math
from functools import partial
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from sparsify.files import atomic_folder, refuse_foreign_folder
from sparsify.models.masking import COUNTED_SITES
from sparsify.reporting.html import page_environment
from sparsify.reporting.numbers import count, percent, share
from sparsify.reporting.plotting import LIGHT, image, page_figure
from sparsify.reporting.tables import Table
from sparsify.reporting.terminal import marked
from sparsify.sparsity.active_parameters import published
from sparsify.sparsity.definitions import INPUTS, formula
from sparsify.sparsity.figures import FIGURES
from sparsify.sparsity.integer_weights import integers_table
from sparsify.sparsity.measure import measure
from sparsify.sparsity.schema import (
    REPORT_FILE,
    LayerRow,
    PairedDifference,
    SparsityReport,
    read_report,
)
from sparsify.sparsity.sparse_weights import bytes_table, weight_zeros_table
from sparsify.sparsity.statistics import ActivationStatistics

TEMPLATE_FILE = "page.html.j2"
PACKAGE = "sparsify.sparsity"


def render_page(report: SparsityReport, statistics: ActivationStatistics) -> str:
    return (
        page_environment(PACKAGE)
        .get_template(TEMPLATE_FILE)
        .render(
            report=report,
            formula=formula(report.ffn_activation, report.masks),
            inputs=INPUTS,
            perplexity=_perplexity(report.loss),
            against=against_table(report),
            weight_tables=weight_tables(report),
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
    "layers_table",
    "measure",
    "read_report",
    "report_summary",
    "write_report",
]


def write_report(report: SparsityReport, statistics: ActivationStatistics, to: Path) -> None:
    """Writes the report into a folder and replaces a report that is already there.

    The folder is written atomically. It holds report.json, per_layer.csv, index.html (self-contained) and one PNG for every
    figure on the page.

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
        columns = [name for name in LayerRow.model_fields if name != "site_zeros"]
        table = csv.DictWriter(file, columns + [f"{site}_zeros" for site in report.site_zeros])
        table.writeheader()
        for row in report.layers:
            sites = {f"{site}_zeros": zeros for site, zeros in row.site_zeros.items()}
            table.writerow(row.model_dump(exclude={"site_zeros"}) | sites)


BAR_CELLS = 24


def report_summary(report: SparsityReport, folder: Path) -> RenderableType:
    headline = Text(f"{report.product_zeros:.1%}", "bold") + Text(
        f" exact zeros ({report.ffn_activation}: gate {report.gate_zeros:.1%}, up {report.up_zeros:.1%})"
        f"{_masked_inputs(report)}{_zero_weights(report)}, weight density {percent(report.weight_density)}, loss {report.loss:.3f} nats per token on {report.text}",
        "default",
    )
    against = against_table(report)
    return Group(
        "",
        headline,
        layers_table(report),
        *([routers_table(report)] if report.routers else []),
        *([routing_table(report)] if report.hidden_routing else []),
        *weight_tables(report),
        *([against] if against else []),
        marked("[bold]Report[/bold]  {}", folder / "index.html"),
    )


def weight_tables(report: SparsityReport) -> list[Table]:
    """Zeros of weights by matrix, and what they or integers save next to zeros of activations; nothing for dense weights."""
    zeros, integers = report.weight_zeros, report.integers
    tables = [] if zeros is None else [weight_zeros_table(zeros), bytes_table(zeros)]
    return tables if integers is None else [*tables, integers_table(integers)]


def _masked_inputs(report: SparsityReport) -> str:
    return "".join(f", {zeros:.1%} at {site}" for site, zeros in report.site_zeros.items())


def _zero_weights(report: SparsityReport) -> str:
    said = "" if report.weight_zeros is None else f", {report.weight_zeros.zeros:.1%} of the weights zero"
    return said if report.integers is None else f"{said}, {report.integers.words}"


def against_table(report: SparsityReport) -> Table | None:
    other = report.against
    if other is None:
        return None
    title = f"{report.model} against {other.model}, on the same {report.num_tokens:,} tokens"
    table = Table(title, ["", report.model, other.model])
    table.add("activation", report.ffn_activation, other.ffn_activation)
    ours, theirs = report.active_parameters, other.active_parameters
    table.add("parameters", count(ours.total), count(theirs.total))
    table.add("loss, nats per token", f"{report.loss:.3f}", f"{other.loss:.3f}")
    table.add("perplexity", *(f"{_perplexity(loss):.2f}" for loss in (report.loss, other.loss)))
    if other.difference is not None:
        table.add("difference of the loss, 95% interval over sequences", _interval(other.difference))
    table.add("exact zeros", percent(report.product_zeros), percent(other.product_zeros))
    for site in (site for site in COUNTED_SITES if site in report.site_zeros | other.site_zeros):
        table.add(f"zeros at {site}", *(percent(one.site_zeros.get(site, 0.0)) for one in (report, other)))
    if report.weight_zeros or other.weight_zeros:
        weights = (one.weight_zeros for one in (report, other))
        table.add("weights that are zero", *(percent(one.zeros if one else 0.0) for one in weights))
    if report.integers or other.integers:
        bits = (one.integers.words if one.integers else "numbers" for one in (report, other))
        table.add("weights and activations", *bits)
    table.add("weight density", percent(report.weight_density), percent(other.weight_density))
    label = "active parameters, perfect predictor"
    table.add(label, count(ours.perfect_predictor), count(theirs.perfect_predictor))
    if report.curves and other.curves:
        for one, another in zip(report.curves.ppl, other.curves.ppl, strict=True):
            name = f"CETT-PPL-{one.percent}%"
            table.add(name, percent(one.sparsity), percent(another.sparsity))
        table.add_rule()
        for one, another in zip(report.curves.top_k, other.curves.top_k, strict=True):
            name = f"perplexity with the smallest {one.share:.0%} of each token dropped"
            cells = (
                _rise(one.loss, report.curves.loss),
                _rise(another.loss, other.curves.loss),
            )
            table.add(name, *cells)
    return table


def _interval(difference: PairedDifference) -> str:
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.4f}"
    return f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"


def _rise(loss: float, untouched: float) -> str:
    return f"{_perplexity(loss):.2f} ({_perplexity(loss - untouched) - 1:+.1%})"


def routers_table(report: SparsityReport) -> Table:
    table = Table("Routers of groups by layer", ["layer", "groups on", "undecided", "tokens without a group"])
    for row in report.routers:
        table.add(str(row.layer), share(row.active), share(row.undecided), share(row.empty_tokens))
    return table


def layers_table(report: SparsityReport) -> Table:
    table = Table(
        f"Exact zeros by layer (measured on {report.num_tokens:,} tokens)",
        ["layer", "gate", "up", "product", *report.site_zeros, "dead", ""],
        left=(0, 5 + len(report.site_zeros)),
    )
    for row in report.layer_rows:
        table.add(
            str(row.layer),
            share(row.gate_zeros),
            share(row.up_zeros),
            share(row.product_zeros),
            *(share(row.site_zeros.get(site)) for site in report.site_zeros),
            f"{row.dead_neurons:,} of {row.num_neurons:,}",
            _bar(row),
        )
    return table


def routing_table(report: SparsityReport) -> Table:
    """Loads of the routers of a mixture of hidden dimensions."""
    routing = report.hidden_routing
    assert routing is not None
    specialised = routing.sub_dimensions - routing.shared
    table = Table(
        f"Load of {specialised} specialised sub-dimensions, of which {routing.active - routing.shared} are chosen; "
        f"{routing.shared} are shared (even: {1 / specialised:.1%})",
        ["layer", "block", "lowest", "highest", "highest / mean", "entropy, nats"],
        left=(0, 1),
    )
    for row in routing.rows:
        lowest, highest = (f"{bound(row.load):.1%}" for bound in (min, max))
        table.add(str(row.layer), row.block, lowest, highest, f"{row.unevenness:.2f}", f"{row.entropy:.2f}")
    return table


def _bar(row: LayerRow) -> Text:
    filled = round(BAR_CELLS * (row.product_zeros or 0.0))
    return Text("█" * filled, style="green") + Text("░" * (BAR_CELLS - filled), style="dim")
