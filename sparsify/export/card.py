"""The model card with measured values, including evaluations of the exported weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch
from omegaconf import OmegaConf

from sparsify.conversion.source_checkpoint import locate
from sparsify.conversion.weight_zeros import weight_sparsity
from sparsify.errors import ExportError, ModelError
from sparsify.evaluation.report import model_index, results_table
from sparsify.evaluation.results import EvaluationResults, read_results
from sparsify.evaluation.subject import model_hash, predictors_hash
from sparsify.export.check import Acceptance
from sparsify.metadata import user_path
from sparsify.mixture.lock import MixtureLock, read_lock
from sparsify.predictors import PredictorFacts, Predictors
from sparsify.recipe.recipe import Recipe
from sparsify.reporting.numbers import count, percent
from sparsify.reporting.tables import markdown_text
from sparsify.runs.history import stages
from sparsify.runs.load import Trained, load_trained
from sparsify.runs.state import TrainingState, read_state
from sparsify.sparsity.definitions import INPUTS
from sparsify.sparsity.report import read_report


@dataclass(frozen=True)
class CardEvaluations:
    """Evaluations for a card: the `model-index` of its header, and tables."""

    header: str
    tables: list[str]


def read_evaluations(
    folders: Sequence[Path], trained: Trained, predictors: Predictors | None
) -> list[EvaluationResults]:
    """Reads evaluations of a checkpoint. Raises ExportError if one is of other weights, or of predictors that are not
    in the bundle.
    """
    found = [read_results(user_path(folder)) for folder in folders]
    hashes = {dtype: _hash(trained, dtype) for dtype in {results.dtype for results in found}}
    for folder, results in zip(folders, found, strict=True):
        if results.model_hash != hashes[results.dtype]:
            raise ExportError(
                f"{folder} is an evaluation of {results.model}, whose weights differ from those of {trained.checkpoint}.",
                allowed="Evaluations of the exported checkpoint.",
                next_step=f"sparsify evaluate {trained.checkpoint} --suite {results.suite}",
            )
        own = None if predictors is None else predictors_hash(predictors)
        if results.predictors is not None and results.predictors.hash != own:
            raise ExportError(
                f"{folder} was evaluated with predictors that are not in the bundle, or with another threshold: "
                f"{results.predictors.folder}, {results.predictors.threshold:g}.",
                next_step="Export with --predictors of that folder, or evaluate with the bundle's predictors.",
            )
    return found


def card_evaluations(name: str, found: Sequence[EvaluationResults]) -> CardEvaluations:
    tables = []
    for results in found:
        title = f"Suite {results.suite}, {results.dtype}"
        if results.predictors is not None:
            title += f", with the predictors above {results.predictors.threshold:g}"
        table = results_table(results)
        table.title = title
        tables.append(table.markdown(level=3))
    header = OmegaConf.to_yaml({"model-index": model_index(name, found)})
    return CardEvaluations(header, tables)


def _hash(trained: Trained, dtype: str) -> str:
    """Hash of the checkpoint's weights in the dtype of an evaluation."""
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
    """The model card of a checkpoint; without `license` it names that of the base model's own card."""
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
    environment.filters |= {"percent": percent, "count": count, "text": markdown_text}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        recipe=recipe,
        state=state,
        dtype=dtype,
        acceptance=acceptance,
        predictors=predictors,
        license=license or base_license(recipe.model.source),
        config=run.initial_config(),
        weights=weight_sparsity(run.initial_config()),
        origin=recipe.model.source or "random weights",
        report=report,
        inputs=INPUTS,
        stages=stages(run),
        evaluations=evaluations,
        has_baseline=run.baseline.metrics.is_file(),
        chat_template=lock.chat_template,
        sources=_sources(recipe, lock, state),
    )


def _sources(recipe: Recipe, lock: MixtureLock, state: TrainingState) -> list[dict[str, object]]:
    """Every source with its planned share, and its delivered share and tokens up to this checkpoint."""
    drawn = {name: state.drawn_sequences.get(name, 0) * lock.sequence_length for name in lock.sources}
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
    """The licence in the base model's card, if the card is on this machine."""
    if source is None:
        return None
    try:
        folder = locate(source)
    except ModelError:
        return None
    card = folder / "README.md"
    if not card.is_file():
        return None
    found = _LICENSE.search(card.read_text(encoding="utf-8", errors="replace").partition("\n---")[0])
    return found[1] if found else None
