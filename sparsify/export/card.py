"""The model card, filled from what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2

from sparsify.conversion.source import locate
from sparsify.errors import ModelError
from sparsify.export.acceptance import Acceptance
from sparsify.export.evaluated import CardEvaluations
from sparsify.export.weights import Trained
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.predictors import PredictorFacts
from sparsify.recipe import Recipe
from sparsify.sparsity.percent import count, percent
from sparsify.sparsity.report import read_report
from sparsify.training.checkpoints import TrainingState, read_state
from sparsify.training.history import stages

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
_LICENSE = re.compile(r"^license:\s*([\w.-]+)\s*$", re.M)


def model_card(
    trained: Trained,
    dtype: str,
    acceptance: Acceptance | None,
    predictors: PredictorFacts | None,
    license: str | None,
    evaluations: CardEvaluations | None = None,
) -> str:
    """The card of a checkpoint of a run.

    Args:
        trained: The checkpoint.
        dtype: Of the bundle's weights.
        acceptance: What the fresh process found; None if none loaded the bundle.
        predictors: Facts of the predictors in the bundle.
        license: Identifier of the base model's licence; what the base says if None.
        evaluations: Of this checkpoint; None for none.
    """
    run = trained.run
    recipe, state, lock = (
        run.load_recipe(),
        read_state(trained.checkpoint),
        read_lock(run.mixture_lock),
    )
    report = read_report(run.report) if run.report.is_dir() else None
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "count": count}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=recipe,
        state=state,
        dtype=dtype,
        acceptance=acceptance,
        predictors=predictors,
        license=license or base_license(recipe.model.source),
        config=json.loads((run.initial / "config.json").read_text()),
        origin=recipe.model.source or "random weights",
        report=report,
        stages=stages(run),
        evaluations=evaluations,
        has_control=run.control.metrics.is_file(),
        sources=_sources(recipe, lock, state),
    )


def _sources(recipe: Recipe, lock: MixtureLock, state: TrainingState) -> list[dict[str, object]]:
    """Every source with its planned share and what it delivered up to this checkpoint."""
    drawn = {name: state.drawn_windows.get(name, 0) * lock.window_tokens for name in lock.sources}
    total = max(sum(drawn.values()), 1)
    return [
        {
            "name": name,
            "group": recipe.mixture.sources[name].group,
            "share": source.token_share,
            "delivered": drawn[name] / total,
            "tokens": drawn[name],
        }
        for name, source in lock.sources.items()
    ]


def base_license(source: str | None) -> str | None:
    """The licence that the base model's own card states, if it is at hand."""
    if source is None:
        return None
    try:
        folder = locate(source)
    except ModelError:
        return None
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = _LICENSE.search(
        card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0]
    )
    return found[1] if found else None
