"""The model card, filled from what was measured.

Evaluations that a model card shows: read, and held against the weights that are exported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
import torch
from omegaconf import OmegaConf

from sparsify.conversion.source import locate
from sparsify.errors import ExportError, ModelError
from sparsify.evaluation.model import model_hash, predictors_hash
from sparsify.evaluation.report import markdown, model_index, own_rows
from sparsify.evaluation.results import EvaluationResults, read_results
from sparsify.export.check import Acceptance
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.predictors import PredictorFacts, Predictors
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.numbers import count, percent
from sparsify.runs.history import stages
from sparsify.runs.load import Trained, load_trained
from sparsify.runs.state import TrainingState, read_state
from sparsify.sparsity.report import read_report


@dataclass(frozen=True)
class CardEvaluations:
    """What a card shows of evaluations: the Hub's part of its header, and tables."""

    header: str
    tables: list[str]


def read_evaluations(
    folders: Sequence[Path], trained: Trained, predictors: Predictors | None
) -> list[EvaluationResults]:
    """Reads evaluations and refuses those that are not of this checkpoint.

    Args:
        folders: That `sparsify evaluate` wrote.
        trained: The checkpoint.
        predictors: That the bundle holds.

    Raises:
        EvaluationError: If one cannot be read.
        ExportError: If one is of other weights, or of predictors that the bundle does not hold.
    """
    found = [read_results(folder.expanduser()) for folder in folders]
    hashes = {dtype: _hash(trained, dtype) for dtype in {results.dtype for results in found}}
    for folder, results in zip(folders, found, strict=True):
        if results.model_hash != hashes[results.dtype]:
            raise ExportError(
                f"{folder} measured {results.model}, whose weights are not those of {trained.checkpoint}.",
                allowed="Evaluations of the checkpoint that is exported.",
                next_step=f"sparsify evaluate {trained.checkpoint} --suite {results.suite}",
            )
        own = None if predictors is None else predictors_hash(predictors)
        if results.predictors is not None and results.predictors.hash != own:
            raise ExportError(
                f"{folder} was masked by predictors that the bundle does not hold, or with another threshold: "
                f"{results.predictors.folder}, {results.predictors.threshold:g}.",
                next_step="Export with --predictors of that folder, or evaluate with the bundle's predictors.",
            )
    return found


def card_evaluations(name: str, found: Sequence[EvaluationResults]) -> CardEvaluations:
    """Evaluations as a card shows them.

    Args:
        name: The model's, as the Hub shall show it.
        found: The evaluations.
    """
    tables = []
    for results in found:
        rows = own_rows(results)
        title = f"Suite {results.suite}, {results.dtype}"
        if results.predictors is not None:
            title += f", with the predictors above {results.predictors.threshold:g}"
        tables.append("#" + markdown(replace(rows, title=title)))
    header = OmegaConf.to_yaml({"model-index": model_index(name, found)})
    return CardEvaluations(header, tables)


def _hash(trained: Trained, dtype: str) -> str:
    """Of the checkpoint's weights in the type that an evaluation computed in."""
    model = load_trained(trained)
    torch.nn.Module.to(model, getattr(torch, dtype))
    return model_hash(model)


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
        has_baseline=run.baseline.metrics.is_file(),
        sources=_sources(recipe, lock, state),
    )


def _sources(recipe: Recipe, lock: MixtureLock, state: TrainingState) -> list[dict[str, object]]:
    """Every source with its planned share and what it delivered up to this checkpoint."""
    drawn = {
        name: state.drawn_sequences.get(name, 0) * lock.sequence_length for name in lock.sources
    }
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
