"""The pictures of a sparsity report in the order of the page: what each is, when it applies, how to draw it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from sparsify.reporting.numbers import percent
from sparsify.reporting.plotting import Theme
from sparsify.sparsity.figures_model import (
    draw_causes,
    draw_experts,
    draw_firing_rates,
    draw_layers,
    draw_positions,
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
    """One picture.

    Attributes:
        name: File name without its ending.
        title: Heading on the page.
        caption: What to see in it, from the report and its counts.
        applies: Whether the report has what it shows.
        draw: The drawing function.
    """

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
        f"A bar is the share of neuron activations that are exactly zero in a layer, {extent}. The thin line spans the "
        "middle 90% of tokens; the marks show how much of it each factor alone makes zero."
    )


def _experts_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    idle = int((statistics.routed_tokens == 0).sum())
    blank = f" {idle} experts saw no token (–)." if idle else ""
    even = 1 / report.num_experts
    return (
        f"Numbers in the cells are percentages. Each token goes to {report.experts_per_token} of {report.num_experts} experts; with even "
        f"routing every expert would carry {percent(even)} of its layer's load.{blank}"
    )


def _firing_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    rates = sorted_firing_rates(statistics)
    hottest = math.ceil(rates.shape[1] / 10)
    share = rates[:, :hottest].sum() / rates.sum() if rates.sum() else 0.0
    return (
        f"One line a layer. The hottest 10% of neurons make {share:.0%} of all firings; a line that ends before the right "
        "edge ends where neurons fired on none of the tokens."
    )


def _causes_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    causes = statistics.zero_causes()
    return (
        f"Of all neuron activations {percent(causes['gate_only'])} are zero because of the gate alone, "
        f"{percent(causes['up_only'])} because of up alone, {percent(causes['both'])} because of both. An exact kernel that "
        "computes the gate first skips up and down where the gate is zero, so the zeros of up alone only spare it down."
    )


def _sources_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    ends = sorted(report.sources, key=lambda source: source.product_zeros)
    return (
        f"From {percent(ends[0].product_zeros)} ({ends[0].source}) to {percent(ends[-1].product_zeros)} ({ends[-1].source}). "
        "The bar behind a dot spans the layers from the least to the most sparse."
    )


def _positions_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    first = report.positions[0]
    return (
        f"A document's first token ({first.num_tokens:,} of them) has {percent(first.product_zeros)} zeros, all tokens together "
        f"{percent(report.product_zeros)}. A document that goes on in another sequence starts there anew."
    )


def _unions_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    engine = report.engine
    reuse = [percent(share) for share in engine.reuse]
    return (
        f"Skipping works neuron by neuron, so tokens that are computed together need the union of their neurons. "
        f"Of the neurons that fire on a token, {reuse[0]} also fired on the token before and {reuse[-1]} on one of the five "
        f"before. Alone, a token needs {percent(engine.perfect_predictor_ffn_bytes)} of its feed-forward weights if a "
        f"predictor is perfect, and {percent(engine.gate_first_ffn_bytes)} with an exact kernel that reads the gate first."
    )


def _cett_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    curves = report.curves
    assert curves is not None
    elbow = next(point for point in curves.cett if point.target == 0.2)
    return (
        f"Neurons that can be left out of a block while its output keeps within a relative error, on {curves.num_tokens:,} tokens. At "
        f"0.2, where papers see the elbow, {percent(elbow.sparsity)}; with these thresholds in all layers at once the loss goes "
        f"from {curves.loss:.3f} to {elbow.loss:.3f}."
    )


def _perplexity_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    curves = report.curves
    assert curves is not None
    found = "; ".join(
        f"{'more than ' if point.is_limit else ''}{percent(point.sparsity)} at {point.percent}% more perplexity (CETT {point.cett:.3f})"
        for point in curves.ppl
    )
    return (
        f"What leaving activations out costs, on {curves.num_labels:,} predictions. CETT-PPL: {found}. "
        "A model that already has more exact zeros than asked for loses nothing."
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
        f"Through {fit.num_points} checkpoints of this run, D in billions of tokens: A(D) = {law}. At {last.tokens:,} tokens it "
        f"predicts {percent(1 - last.active)} zeros ({fit.confidence:.0%} band {percent(max(0.0, 1 - last.high))} to "
        f"{percent(min(1.0, 1 - last.low))}). A run with another schedule or another learning rate follows another curve."
    )


def _stages_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    return "Validation loss on the same held-out sequences of the run's mixture, sources weighted by token share. Lower is better."


def _trajectory_caption(report: SparsityReport, statistics: ActivationStatistics) -> str:
    baseline = report.trajectory is not None and report.trajectory.baseline
    return (
        "The baseline saw the same tokens in the same order and differs in its activation only: the gap between the lines "
        "is what the zeros cost."
        if baseline
        else "No dense baseline was trained, so what the data alone would have changed is not known."
    )


def _has_zeros(report: SparsityReport) -> bool:
    return report.product_zeros > 0


FIGURES = (
    ReportFigure(
        "stages",
        "What it cost",
        _stages_caption,
        lambda report: len(report.stages) > 1,
        draw_stages,
    ),
    ReportFigure(
        "layers", "Where the zeros are", _layers_caption, lambda report: True, draw_layers
    ),
    ReportFigure(
        "experts",
        "Experts: zeros and load",
        _experts_caption,
        lambda report: report.num_experts > 1,
        draw_experts,
    ),
    ReportFigure("causes", "Which factor makes them", _causes_caption, _has_zeros, draw_causes),
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
    ReportFigure("unions", "What tokens share", _unions_caption, lambda report: True, draw_unions),
    ReportFigure(
        "cett",
        "How sparse it could be",
        _cett_caption,
        lambda report: report.curves is not None,
        draw_cett,
    ),
    ReportFigure(
        "perplexity",
        "What leaving out more costs",
        _perplexity_caption,
        lambda report: report.curves is not None,
        draw_perplexity,
    ),
    ReportFigure(
        "trajectory",
        "How it got there",
        _trajectory_caption,
        lambda report: report.trajectory is not None and len(report.trajectory.sparse) > 1,
        draw_trajectory,
    ),
    ReportFigure(
        "scaling",
        "Where it is going",
        _scaling_caption,
        lambda report: report.scaling is not None,
        draw_scaling,
    ),
    ReportFigure(
        "layers_over_time",
        "Layers during training",
        lambda report, statistics: "Share of zeros of every layer in the sparse run.",
        lambda report: len(layer_points(report)) > 1,
        draw_layers_over_time,
    ),
)
