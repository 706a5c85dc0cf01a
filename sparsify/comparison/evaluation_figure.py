"""The picture of an evaluation comparison: quality against active parameters."""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsify.comparison.evaluations import EvaluatedModel, EvaluationComparison
from sparsify.evaluation.scores import Measured
from sparsify.evaluation.table import count_text
from sparsify.sparsity.pictures import WIDTH_INCHES
from sparsify.sparsity.themes import Theme

NAME = "quality"
TITLE = "Quality against active parameters"


def quality_caption(comparison: EvaluationComparison) -> str:
    """What to see in the picture."""
    return (
        f"{_what(comparison)}, with its 95% interval over items, against the parameters that a token needs: from those of a "
        "perfect predictor (dot) to those of an exact gate-first kernel (bar's end). Rings are dense. A model that predictors mask "
        "has a dot alone: what they switch on, and themselves."
    )


def draw_quality(comparison: EvaluationComparison, theme: Theme) -> Figure:
    """A point a model, dense ones as rings."""
    figure = Figure(figsize=(WIDTH_INCHES, 3.6))
    axes = figure.subplots()
    scale = 100.0 if _mean_of_accuracies(comparison) else 1.0
    for model in comparison.models:
        score = _quality(comparison, model)
        if score is None:
            continue
        dense = model.ffn_activation == "swiglu"
        colour = theme.control if dense else theme.product
        value = scale * score.value
        low, high = (
            scale * bound if bound is not None else value for bound in (score.low, score.high)
        )
        axes.plot(
            [model.active_parameters, model.gate_first_parameters],
            [value] * 2,
            color=colour,
            linewidth=1.4,
        )
        axes.errorbar(
            model.active_parameters,
            value,
            yerr=[[value - low], [high - value]],
            fmt="o",
            color=colour,
            markerfacecolor=theme.surface if dense else colour,
            markersize=7,
            capsize=3,
        )
        axes.annotate(
            model.name,
            (model.active_parameters, value),
            xytext=(8, 8),
            textcoords="offset points",
            color=theme.ink,
        )
    axes.set_xlabel("active parameters of one token")
    axes.set_ylabel(_what(comparison))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: count_text(round(count))))
    axes.margins(x=0.18, y=0.2)
    return figure


def _mean_of_accuracies(comparison: EvaluationComparison) -> bool:
    return all(model.average is not None for model in comparison.models)


def _what(comparison: EvaluationComparison) -> str:
    if _mean_of_accuracies(comparison):
        return "mean of accuracies, per cent"
    first = comparison.tasks[0]
    metric = next(m.tasks[first].metric for m in comparison.models if first in m.tasks)
    return f"{metric} of {first}"


def _quality(comparison: EvaluationComparison, model: EvaluatedModel) -> Measured | None:
    if _mean_of_accuracies(comparison):
        return model.average
    task = model.tasks.get(comparison.tasks[0])
    return None if task is None else task.score
