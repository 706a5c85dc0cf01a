"""Figures and captions of a sparsity report, in the order of the page."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean

from matplotlib.figure import Figure

from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import Theme
from sparsify.sparsity.definitions import INPUTS
from sparsify.sparsity.figures_model import (
    draw_causes,
    draw_experts,
    draw_firing_rates,
    draw_hidden_routing,
    draw_layers,
    draw_masked_inputs,
    draw_positions,
    draw_routers,
    draw_sources,
    draw_unions,
)
from sparsify.sparsity.figures_training import (
    draw_cett,
    draw_layers_over_time,
    draw_perplexity,
    draw_scaling,
    draw_stages,
    draw_trajectory,
    layer_points,
)
from sparsify.sparsity.measure import sorted_firing_rates
from sparsify.sparsity.schema import SparsityReport
from sparsify.sparsity.statistics import ActivationStatistics


@dataclass(frozen=True)
class ReportFigure:
    name: str
    title: str
    caption: Callable[[SparsityReport, ActivationStatistics], str]
    applies: Callable[[SparsityReport], bool]
    draw: Callable[[SparsityReport, ActivationStatistics, Theme], Figure]


def _layers_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    rows = [row for row in report.layer_rows if row.product_zeros is not None]
    low = min(rows, key=lambda row: row.product_zeros or 0)
    high = max(rows, key=lambda row: row.product_zeros or 0)
    extent = (
        f"{percent(low.product_zeros)} in every layer"
        if low.product_zeros == high.product_zeros
        else f"from {percent(low.product_zeros)} (layer {low.layer}) to {percent(high.product_zeros)} (layer {high.layer})"
    )
    return (
        f"Bars: share of neuron activations of a layer that are exactly zero, {extent}. Thin lines: 5th to 95th percentile "
        "over tokens. Marks: share of zeros of each factor."
    )


def _masked_inputs_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    found = "; ".join(f"{site}, {INPUTS[site]}: {percent(zeros)}" for site, zeros in report.site_zeros.items())
    return f"Share of exact zeros where the model's stored mask drops elements or groups, by layer. {found}."


def _routers_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    active = [row.active for row in report.routers]
    mean = {name: fmean(getattr(row, name) for row in report.routers) for name in ("undecided", "empty_tokens")}
    return (
        f"Scores of the routers of groups: the mean over layers, and each layer as a thin line. {percent(fmean(active))} of the groups "
        f"are on, {percent(min(active))} to {percent(max(active))} by layer; {percent(mean['undecided'])} are within 0.1 of the "
        f"threshold. {percent(mean['empty_tokens'])} of the tokens have no group in a layer."
    )


def _hidden_routing_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    routing = report.hidden_routing
    assert routing is not None
    worst = max(routing.rows, key=lambda row: row.unevenness)
    specialised = routing.sub_dimensions - routing.shared
    return (
        f"Numbers are percentages. Every token uses the first {routing.shared} of {routing.sub_dimensions} sub-dimensions; each router "
        f"chooses {routing.active - routing.shared} of the other {specialised}. With even loads each of these would have "
        f"{percent(1 / specialised)} of the choices; the largest load is {worst.unevenness:.2f} times that ({worst.block} of layer "
        f"{worst.layer})."
    )


def _experts_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    idle = int((statistics.routed_tokens == 0).sum())
    blank = f" {idle} experts received no token (–)." if idle else ""
    even = 1 / report.num_experts
    return (
        f"Numbers are percentages. Each token is routed to {report.experts_per_token} of {report.num_experts} experts; with even "
        f"routing every expert would have {percent(even)} of its layer's load.{blank}"
    )


def _firing_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    rates = sorted_firing_rates(statistics)
    hottest = math.ceil(rates.shape[1] / 10)
    share = rates[:, :hottest].sum() / rates.sum() if rates.sum() else 0.0
    return (
        f"One line per layer. The hottest 10% of neurons account for {share:.0%} of all firings. A line that ends before the "
        "right edge ends at the first dead neuron."
    )


def _causes_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    causes = statistics.zero_causes()
    neither = (
        f", and {percent(causes['underflow'])} because of neither: they do not exceed a threshold, or underflow"
        if causes["underflow"]
        else ""
    )
    return (
        f"{percent(causes['gate_only'])} of all neuron activations are zero because of the gate alone, "
        f"{percent(causes['up_only'])} because of up alone, {percent(causes['both'])} because of both{neither}. An exact kernel "
        "that computes the gate first skips up and down where the gate is zero; where only up is zero, it skips only down."
    )


def _sources_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    ends = sorted(report.sources, key=lambda source: source.product_zeros)
    return (
        f"From {percent(ends[0].product_zeros)} ({ends[0].source}) to {percent(ends[-1].product_zeros)} ({ends[-1].source}). "
        "Dots: all layers. Bars: range over layers."
    )


def _positions_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    first = report.positions[0]
    return (
        f"The first tokens of documents ({first.num_tokens:,}) have {percent(first.product_zeros)} zeros, all tokens "
        f"{percent(report.product_zeros)}. Positions start again at 0 where a document continues in another sequence."
    )


def _unions_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    engine = report.engine
    reuse = [percent(share) for share in engine.reuse]
    return (
        f"Tokens that are computed together need the union of their neurons. Of the neurons that fire on a token, {reuse[0]} "
        f"also fired on the token before and {reuse[-1]} on one of the five tokens before. A single token needs "
        f"{percent(engine.perfect_predictor_ffn_bytes)} of its feed-forward weights with a perfect predictor, and "
        f"{percent(engine.gate_first_ffn_bytes)} with an exact gate-first kernel."
    )


def _cett_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    curves = report.curves
    assert curves is not None
    elbow = next(point for point in curves.cett if point.target == 0.2)
    return (
        f"Share of neurons that can be dropped at a given relative error of the block's output, on {curves.num_tokens:,} tokens. "
        f"At 0.2, the elbow in the literature, it is {percent(elbow.sparsity)}; with these thresholds in all layers at once the "
        f"loss changes from {curves.loss:.3f} to {elbow.loss:.3f}."
    )


def _perplexity_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    curves = report.curves
    assert curves is not None
    found = "; ".join(
        f"{'more than ' if point.is_limit else ''}{percent(point.sparsity)} at {point.percent}% higher perplexity (CETT {point.cett:.3f})"
        for point in curves.ppl
    )
    return (
        f"Increase of perplexity when small activations are dropped, on {curves.num_labels:,} predictions. CETT-PPL: {found}. "
        "A model that already has more exact zeros than that is unchanged."
    )


def _scaling_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    fit = report.scaling
    assert fit is not None
    last = fit.predicted[-1]
    law = (
        f"exp(−{fit.c:.3g}·D^{fit.alpha:.3g} {fit.b:+.3g}) + {fit.limit:.4f}"
        if fit.b is not None
        else f"−{fit.c:.3g} / D^{fit.alpha:.3g} + {fit.limit:.4f}"
    )
    return (
        f"Fit to {fit.num_points} checkpoints of this run, D in billions of tokens: A(D) = {law}. At {last.tokens:,} tokens it "
        f"predicts {percent(1 - last.active)} zeros ({fit.confidence:.0%} band {percent(max(0.0, 1 - last.high))} to "
        f"{percent(min(1.0, 1 - last.low))}). The fit does not hold for other schedules or learning rates."
    )


def _stages_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    return "Validation loss on the same held-out sequences of the run's mixture, sources weighted by token share. Lower is better."


def _trajectory_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    baseline = report.trajectory is not None and report.trajectory.baseline
    return (
        "The dense baseline was trained on the same tokens in the same order and differs only in its activation: the gap "
        "between the lines is the cost of the zeros."
        if baseline
        else "No dense baseline was trained, so the effect of the data alone is unknown."
    )


def _has_zeros(report: SparsityReport) -> bool:
    return report.product_zeros > 0


FIGURES = (
    ReportFigure(
        "stages",
        "Loss by stage",
        _stages_caption,
        lambda report: len(report.stages) > 1,
        draw_stages,
    ),
    ReportFigure("layers", "Zeros by layer", _layers_caption, lambda report: True, draw_layers),
    ReportFigure(
        "masked_inputs",
        "Zeros at masked inputs",
        _masked_inputs_caption,
        lambda report: bool(report.site_zeros),
        draw_masked_inputs,
    ),
    ReportFigure(
        "routers",
        "Scores of routers",
        _routers_caption,
        lambda report: bool(report.routers),
        draw_routers,
    ),
    ReportFigure(
        "experts",
        "Experts: zeros and load",
        _experts_caption,
        lambda report: report.num_experts > 1,
        draw_experts,
    ),
    ReportFigure(
        "hidden_routing",
        "Hidden dimensions: load by sub-dimension and layer",
        _hidden_routing_caption,
        lambda report: report.hidden_routing is not None,
        draw_hidden_routing,
    ),
    ReportFigure("causes", "Zeros by cause", _causes_caption, _has_zeros, draw_causes),
    ReportFigure(
        "sources",
        "Zeros by source",
        _sources_caption,
        lambda report: len(report.sources) > 1,
        draw_sources,
    ),
    ReportFigure(
        "positions",
        "Zeros by position",
        _positions_caption,
        lambda report: len(report.positions) > 1,
        draw_positions,
    ),
    ReportFigure(
        "firing_rates",
        "Hot and cold neurons",
        _firing_caption,
        lambda report: True,
        draw_firing_rates,
    ),
    ReportFigure("unions", "Neurons shared between tokens", _unions_caption, lambda report: True, draw_unions),
    ReportFigure(
        "cett",
        "Sparsity at a given output error",
        _cett_caption,
        lambda report: report.curves is not None,
        draw_cett,
    ),
    ReportFigure(
        "perplexity",
        "Perplexity when more activations are dropped",
        _perplexity_caption,
        lambda report: report.curves is not None,
        draw_perplexity,
    ),
    ReportFigure(
        "trajectory",
        "Loss and zeros during training",
        _trajectory_caption,
        lambda report: report.trajectory is not None and len(report.trajectory.sparse) > 1,
        draw_trajectory,
    ),
    ReportFigure(
        "scaling",
        "Zeros with more training",
        _scaling_caption,
        lambda report: report.scaling is not None,
        draw_scaling,
    ),
    ReportFigure(
        "layers_over_time",
        "Zeros by layer during training",
        lambda report, statistics: "Share of zeros of every layer in the sparse run.",
        lambda report: len(layer_points(report)) > 1,
        draw_layers_over_time,
    ),
)
